"""What holds for every decision, whatever it is about."""

import re
from datetime import datetime, timedelta
from typing import get_args

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.plan.decide import CAP_WAIT, channels_of, decide, narrowed, plan, wakes
from engine.plan.decisions import WHYS, Decision, Inputs, Stage
from engine.plan.hours import open_from, silent_until
from engine.plan.preferences import QUIETABLE
from engine.planner.plans import Due, receipt_of
from engine.profiles.explanation import explain
from seamark.protocol.receipts import Receipt, decode_receipt
from tests.support.plans import inputs

_WHEN = re.compile(r"now|never|at:\S+Z|unless_seen:[1-9]\d*|digest:.*/\S+Z")


@settings(max_examples=40, deadline=None)
@given(inputs())
def test_there_is_a_decision_for_everything_and_its_record_explains_it_and_gives_the_same_again(
    given_inputs: Inputs,
) -> None:
    decided = plan(given_inputs)
    assert tuple(decided) == channels_of(given_inputs)
    for decision in decided.values():
        assert _WHEN.fullmatch(decision.when)
        why, _, which = decision.why.partition(":")
        assert why in WHYS
        assert bool(which) == (why in {"suppressed", "killed"})
    record = recorded(given_inputs, decided)
    replayed = msgspec.json.decode(record.inputs, type=Inputs)
    assert (record.at, replayed.now) == (given_inputs.now, given_inputs.now)
    assert plan(replayed) == decided
    told = {channel: Decision(one.when, one.why) for channel, one in (record.plan or {}).items()}
    assert told == {channel: one for channel, one in decided.items() if channel in told}
    assert decided.keys() - told.keys() <= {"inapp"}
    explained = explain(given_inputs)
    assert {channel: Decision(one.when, one.why) for channel, one in explained.plan.items()} == decided
    assert explained.inputs == narrowed(replayed) == replayed, "there is nothing left to leave out"


def recorded(asked: Inputs, decided: dict[str, Decision]) -> Receipt:
    """The stored fact of a plan, as a planner writes it."""
    due = Due(asked.notification, "rcpt.0.t.alice", asked.facts.stored_at, None, None)
    written = receipt_of(due, asked, decided, 5, always=True)
    assert written is not None
    return decode_receipt(written.payload)


@settings(max_examples=40, deadline=None)
@given(inputs())
def test_every_wait_ends_and_whoever_wakes_in_time_waits_for_no_silence_again(given_inputs: Inputs) -> None:
    for channel in channels_of(given_inputs):
        asked, steps = given_inputs, 0
        while (woken := wakes(decide(channel, asked), asked)) is not None:
            stage, at = woken
            assert stage != asked.facts.stage or stage == "cap"
            now = max(at, asked.now)
            assert stage != "cap" or now <= asked.facts.stored_at + CAP_WAIT
            capped_until = now + timedelta(hours=5)  # the worst: each time it is asked, the cap is exhausted again
            asked = replace(asked, now=now, facts=replace(asked.facts, stage=stage, capped_until=capped_until))
            steps += 1
            assert steps < 12


@settings(max_examples=40, deadline=None)
@given(inputs(), st.sampled_from(get_args(Stage)))
def test_nobody_is_disturbed_in_quiet_hours_or_outside_send_windows_but_by_what_is_critical(
    asked: Inputs, stage: Stage
) -> None:
    asked = replace(
        asked, facts=replace(asked.facts, stage=stage)
    )  # whoever wakes may be held up into the next silence
    own = asked.profile.preferences.quiet_hours
    quiet = own if own is not None else asked.defaults.quiet_hours
    for channel, decision in plan(asked).items():
        if channel not in QUIETABLE or decision.when == "never" or decision.why in {"critical", "throttled"}:
            continue
        kind, _, rest = decision.when.partition(":")
        if kind not in {"now", "at"}:
            continue
        due = asked.now if kind == "now" else datetime.fromisoformat(rest)
        assert (due > asked.now) == (kind == "at")
        if quiet is not None and channel in quiet.channels:
            assert silent_until(quiet.windows, due, asked.zone) == due
        if asked.defaults.send_windows:
            assert open_from(asked.defaults.send_windows, due, asked.zone) == due


@settings(max_examples=40, deadline=None)
@given(inputs())
def test_nothing_goes_through_a_legal_opt_out(asked: Inputs) -> None:
    for channel, decision in plan(asked).items():
        held = [s for s in asked.profile.suppressions if s.channel == channel != "inapp" and s.reason == "opted_out"]
        if any(s.scope in {"all", asked.category} and not (s.expires_at and s.expires_at <= asked.now) for s in held):
            assert decision.when == "never"
