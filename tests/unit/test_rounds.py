"""Rounds: nothing of a batch of events is lost, doubled or reordered by cutting it up, and any cut can be resumed."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from engine import limits, metrics
from engine.dispatch import rounds
from engine.dispatch.rounds import Dead, Planned, batches, fan_out, not_covered, plan
from engine.log.marks import Mark
from engine.partition.reader import Delivered
from seamark.protocol import limits as protocol_limits
from seamark.protocol.subjects import encode_token, partition_of

EPOCH = "abcd1234"
PARTITIONS = 4
USERS = st.lists(st.sampled_from([f"user{i}" for i in range(30)] + ["é", "a.b"]), min_size=1, max_size=12)
STORED_AT = 1_769_860_800_123_456_789


def delivered(
    seq: int, payload: bytes, *, subject: bytes = b"ev.0.default.k.demo.hello", headers: bytes = b""
) -> Delivered:
    return Delivered(subject, seq, STORED_AT + seq, headers, payload)


def event(seq: int, to: list[str], data: Any = None) -> Delivered:
    return delivered(seq, json.dumps({"id": f"e{seq}", "to": to, "data": data}).encode())


def planned(one: Delivered) -> Planned:
    outcome = plan(one, EPOCH)
    assert isinstance(outcome, Planned)
    return outcome


def mark(batch: rounds.Batch) -> Mark:
    return Mark(EPOCH, batch.seq, 1, "me", "log", batch.user)


def said(entries: Any) -> list[tuple[int, str]]:
    return [(entry.seq, entry.part) for entry in entries]


def stored(messages: Any) -> list[tuple[int, str]]:
    records = [json.loads(message.payload) for message in messages]
    return [(record["event"]["seq"], encode_token(record["user"])) for record in records]


@given(st.lists(USERS, max_size=12))
def test_each_recipient_gets_one_entry_in_his_partition_in_the_order_marks_count(audiences: list[list[str]]) -> None:
    entries = fan_out([planned(event(seq, to)) for seq, to in enumerate(audiences, 1)], PARTITIONS)
    for partition, found in entries.items():
        assert found
        assert said(found) == sorted(set(said(found)))
        assert {partition_of("default", token, PARTITIONS) for _, token in said(found)} == {partition}
    everyone = sorted((seq, encode_token(user)) for seq, to in enumerate(audiences, 1) for user in set(to))
    assert sorted(item for found in entries.values() for item in said(found)) == everyone


@settings(deadline=None)
@given(
    audiences=st.lists(USERS, min_size=1, max_size=10),
    sizes=st.lists(st.integers(0, 3000), min_size=10, max_size=10),
    messages_max=st.integers(2, 9),
    fan_out_max=st.integers(2, 9),
    first_max=st.integers(2, 9),
    bytes_max=st.integers(1500, 12_000),
)
def test_batches_hold_every_entry_once_within_the_limits_and_each_can_be_resumed_from(
    audiences: list[list[str]], sizes: list[int], messages_max: int, fan_out_max: int, first_max: int, bytes_max: int
) -> None:
    events = [planned(event(seq, to, "x" * sizes[seq - 1])) for seq, to in enumerate(audiences, 1)]
    last_seq = len(audiences) + 3  # dead or duplicate events may follow the last record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "BATCH_MESSAGES_MAX", messages_max)
        patch.setattr(rounds, "FAN_OUT_MESSAGES_MAX", min(fan_out_max, messages_max))
        patch.setattr(rounds, "FAN_OUT_FIRST_MESSAGES_MAX", first_max)
        patch.setattr(rounds, "BATCH_BYTES_MAX", bytes_max)
        for partition, entries in (fan_out(events, PARTITIONS) | {99: []}).items():
            cut = list(batches(entries, partition, last_seq))
            assert [item for batch in cut for item in stored(batch.messages)] == said(entries)
            assert (cut[-1].seq, cut[-1].user) == (last_seq, None)
            assert all(batch.messages for batch in cut[:-1])
            done: list[tuple[int, str]] = []
            for batch in cut:
                # With its mark a batch stays within what the broker takes.
                assert len(batch.messages) < messages_max
                size = sum(len(message.payload) + len(message.headers) for message in batch.messages)
                assert size <= bytes_max or len(batch.messages) == 1
                done += stored(batch.messages)
                rest = not_covered(entries, mark(batch))
                assert done + said(rest) == said(entries)
                # Whoever takes over reads on from the mark, and that event is not behind the first one left.
                assert all(entry.seq >= mark(batch).next_seq for entry in rest)
                resumed = batches(rest, partition, last_seq)
                assert done + [item for again in resumed for item in stored(again.messages)] == said(entries)


@pytest.mark.parametrize(
    "to",
    [
        [f"user{number * 7919 % 2500}" for number in range(2600)],  # in no order, and some twice
        [*(f"user{number}" for number in range(2500)), "topic:news"],
        [*(f"user{number}" for number in range(2500)), ""],
    ],
    ids=["users", "a topic", "an impossible user"],
)
def test_an_event_for_very_many_is_planned_by_steps_with_the_same_outcome(to: list[str]) -> None:
    steps = list(rounds.rounds_by_steps([event(1, to)], EPOCH))
    assert steps.count(None) >= 2
    [found] = [outcome for each in steps if each is not None for outcome in (*each.planned, *each.dead)]
    expected = plan(event(1, to), EPOCH)
    if isinstance(expected, Dead):
        assert found == expected
    else:
        assert found.accepted == expected.accepted
        assert len(expected.accepted.recipients) == 2500


@settings(deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(1, 50))
def test_rounds_hold_every_event_once_and_in_order(sizes: list[int], first: int) -> None:
    # 0 recipients: an event that is refused.
    pulled = [event(seq, [f"u{i}" for i in range(size)]) for seq, size in enumerate(sizes, first)]
    cut = list(rounds.rounds(pulled, EPOCH))
    seqs = [sorted([one.seq for one in each.planned] + [dead.delivered.seq for dead in each.dead]) for each in cut]
    assert [seq for each in seqs for seq in each] == [one.seq for one in pulled]
    for each, numbers in zip(cut, seqs, strict=True):
        assert each.last_seq == numbers[-1]
        assert each.oldest_nanoseconds == STORED_AT + numbers[0]
        records = sum(len(one.accepted.recipients) for one in each.planned)
        assert records < limits.BATCH_MESSAGES_MAX or len(numbers) == 1
    assert list(rounds.rounds([], EPOCH)) == []


def test_small_events_fill_the_largest_batch_and_a_large_one_is_cut_so_that_its_first_records_come_soon() -> None:
    small = [planned(event(seq, [f"user-{seq % 7}"])) for seq in range(1, 1001)]
    large = planned(event(1001, [f"user-{i}" for i in range(600)]))
    entries = fan_out([*small, large], 1)[0]
    sizes = [len(batch.messages) for batch in batches(entries, 0, 1001)]
    assert sizes == [limits.BATCH_MESSAGES_MAX - 1, *[limits.FAN_OUT_MESSAGES_MAX - 1] * 2, 1600 - 999 - 2 * 249]
    few = [planned(event(seq, ["ann", "bob", "cid"])) for seq in range(1, 401)]
    sizes = [len(batch.messages) for batch in batches(fan_out(few, 1)[0], 0, 400)]
    assert sizes == [limits.BATCH_MESSAGES_MAX - 1, 1200 - 999]


def test_how_large_a_batch_may_be_is_asked_when_it_is_built() -> None:
    large, most = planned(event(1, [f"user-{i}" for i in range(600)])), 10
    due = batches(fan_out([large], 1)[0], 0, 1, most=lambda: most)
    sizes = [len(next(due).messages), len(next(due).messages)]
    most = limits.BATCH_MESSAGES_MAX
    assert [*sizes, *(len(batch.messages) for batch in due)] == [9, 9, 249, 249, 84]


def test_the_first_users_of_an_event_for_many_wait_for_a_small_batch_only() -> None:
    sizes = [limits.FAN_OUT_FIRST_MESSAGES_MAX - 1, limits.FAN_OUT_MESSAGES_MAX - 1]
    many = planned(event(1, [f"user-{i}" for i in range(sum(sizes) + 5)]))
    entries = fan_out([many], 1)[0]
    assert [len(batch.messages) for batch in batches(entries, 0, 1)] == [*sizes, 5]
    small = [planned(event(seq, [f"user-{seq}"])) for seq in range(1, 400)]
    assert len(list(batches(fan_out(small, 1)[0], 0, 400))) == 1
    mixed = fan_out([planned(event(1, [f"user-{i}" for i in range(249)])), *small[1:]], 1)[0]
    assert len(list(batches(mixed, 0, 400))) == 1
    for partition, scattered in fan_out([planned(event(1, [f"user-{i}" for i in range(10_000)]))], 64).items():
        assert len(list(batches(scattered, partition, 1))) == 1, "where one takes all, a second one only costs"


def test_an_audience_at_its_limit_is_cut_into_full_batches() -> None:
    one = planned(event(7, [f"user-{i}" for i in range(protocol_limits.RECIPIENTS_MAX)], {"text": "hi"}))
    for partition, entries in fan_out([one], PARTITIONS).items():
        cut = list(batches(entries, partition, 7))
        assert len(cut[0].messages) == limits.FAN_OUT_FIRST_MESSAGES_MAX - 1
        assert {len(batch.messages) for batch in cut[1:-1]} == {limits.FAN_OUT_MESSAGES_MAX - 1}
        assert {batch.seq for batch in cut} == {7}
        assert [batch.user is None for batch in cut] == [False] * (len(cut) - 1) + [True]


def test_what_is_withheld_between_two_batches_holds_from_the_first_record_of_the_second_on() -> None:
    one = planned(event(7, [f"user-{i}" for i in range(600)], {"text": "hi"}))
    due = batches(fan_out([one], 1)[0], 0, 7)
    shown = next(due)
    one.template.withhold("cancelled")
    rest = [message for batch in due for message in batch.messages]
    assert len(shown.messages) + len(rest) == 600
    plans = [{json.loads(m.payload)["plan"]["inapp"]["why"] for m in part} for part in (shown.messages, rest)]
    assert plans == [{"default"}, {"cancelled"}]


def test_large_records_are_cut_by_bytes() -> None:
    data = "x" * (protocol_limits.EVENT_DATA_BYTES_MAX - 2)
    one = planned(event(7, [f"user-{i}" for i in range(200)], data))
    for partition, entries in fan_out([one], PARTITIONS).items():
        for batch in batches(entries, partition, 7):
            assert sum(len(message.payload) for message in batch.messages) <= limits.BATCH_BYTES_MAX


@pytest.mark.parametrize(
    ("reason", "one"),
    [
        ("json", delivered(1, b"{")),
        ("schema", delivered(1, b'{"id":1,"to":["a"]}')),
        ("subject", delivered(1, b'{"id":"e","to":["a"]}', subject=b"ev.0.default.=61.demo")),
        ("subject", delivered(1, b'{"id":"e","to":["a"]}', subject=b"ev.0.default.k.\xff")),
        ("internal", Delivered(b"ev.0.default.k.demo", 1, 10**30, b"", b'{"id":"e","to":["a"]}')),
    ],
)
def test_an_event_that_cannot_be_planned_is_dead_with_its_reason(reason: str, one: Delivered) -> None:
    outcome = plan(one, EPOCH)
    assert isinstance(outcome, Dead)
    assert (outcome.reason, outcome.delivered) == (reason, one)


@pytest.mark.parametrize("channels", [["inapp", "push", "slack"], ["slack", "push", "inapp"]])
def test_an_event_that_waited_goes_by_the_channels_that_there_are_of_those_it_names(channels: list[str]) -> None:
    unfit = metrics.unfit_events.labels("channels")
    before = unfit._value.get()
    one = planned(delivered(1, json.dumps({"id": "e1", "to": ["alice"], "channels": channels}).encode()))
    record = json.loads(one.template.body("alice"))
    assert set(record["plan"]) == {"inapp", "push"}
    assert unfit._value.get() == before + 1


def test_an_event_that_names_no_channel_that_there_is_is_dead() -> None:
    outcome = plan(delivered(1, b'{"id":"e1","to":["alice"],"channels":["in-app"]}'), EPOCH)
    assert isinstance(outcome, Dead)
    assert (outcome.reason, "'in-app'" in outcome.detail) == ("channels", True)


def test_of_a_fault_that_comes_again_and_again_the_log_tells_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_told", set())
    with capture_logs() as logs:
        for seq in range(1, 9):
            planned(delivered(seq, b'{"id":"e1","to":["alice"],"channels":["inapp","fax%d"]}' % seq))
    assert [one["event"] for one in logs] == ["event_unfit"]


@example(b"", b"", b"NATS/1.0\r\ntraceparent:")
@given(st.binary(max_size=100), st.binary(max_size=40), st.binary(max_size=60))
def test_no_bytes_whatever_can_stop_a_partition(payload: bytes, subject: bytes, headers: bytes) -> None:
    assert isinstance(plan(Delivered(subject, 1, STORED_AT, headers, payload), EPOCH), Dead)
    plan(delivered(1, b'{"id":"e","to":["a"]}', headers=headers), EPOCH)


def test_a_record_that_would_be_too_large_for_the_broker_is_dead_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "RECORD_BYTES_MAX", 1000)
    outcome = plan(event(1, ["a"], "x" * 1000), EPOCH)
    assert isinstance(outcome, Dead)
    assert outcome.reason == "size"
