"""An endpoint is disabled at once by 410, and by five days of nothing but failures of at least two messages. Never by reports that came late."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Outcome
from engine.channels.webhook.health import FAILING, Health, enabled, reported
from engine.channels.webhook.schedule import TABLE

START = datetime(2026, 1, 1, tzinfo=UTC)
OK, GONE, BROKEN = (TABLE.judged("webhook", status) for status in (200, 410, 500))

reports = st.lists(
    st.tuples(st.sampled_from(["ok", "failed", "failed", "failed"]), st.sampled_from("abc"), st.integers(0, 20 * 24)),
    max_size=25,
)  # fmt: skip


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def fold(entries, health: Health | None = None) -> Health:
    health = health or enabled(START)
    for kind, message, hours in entries:
        health = reported(health, OK if kind == "ok" else BROKEN, message, at(hours))
    return health


def is_failing(entries) -> bool:
    """The rule in plain words, of everything that is known: since the last success two messages failed, five days apart."""
    ok = max((hours for kind, _, hours in entries if kind == "ok"), default=-1)
    failed = [(message, hours) for kind, message, hours in entries if kind != "ok" and hours > ok]
    times = [hours for _, hours in failed]
    return len({message for message, _ in failed}) >= 2 and at(max(times)) - at(min(times)) >= FAILING


@given(reports)
def test_reports_in_order_disable_an_endpoint_exactly_when_the_rule_says_so(entries) -> None:
    entries = sorted(entries, key=lambda entry: (entry[2], entry[0] == "ok"))
    expected = any(is_failing(entries[: n + 1]) for n in range(len(entries)))
    assert (fold(entries).disabled == "failing") == expected


@given(reports)
def test_reports_in_any_order_never_disable_an_endpoint_that_the_rule_would_spare(entries) -> None:
    health = enabled(START)
    for n, entry in enumerate(entries):
        health = fold([entry], health)
        if health.disabled:
            assert is_failing(entries[: n + 1])
            return


@given(reports)
def test_a_report_that_comes_twice_changes_nothing(entries) -> None:
    for n in range(len(entries)):
        once = fold(entries[: n + 1])
        assert fold([entries[n]], once).disabled == once.disabled


@pytest.mark.parametrize("status", [301, 400, 401, 404, 408, 425, 429, 500, 502, 503, 504])
def test_every_failure_counts(status: int) -> None:
    failure = TABLE.judged("webhook", status)
    health = reported(enabled(START), failure, "a", at(0))
    assert reported(health, failure, "b", at(119)).disabled is None
    assert reported(health, failure, "a", at(120)).disabled is None, "one message alone may be at fault itself"
    assert reported(health, failure, "b", at(120)).disabled == "failing"


def test_gone_is_gone_at_once_and_what_was_sent_before_it_was_enabled_again_says_nothing() -> None:
    gone = reported(enabled(START), GONE, "a", at(1))
    assert (gone.disabled, gone.disabled_at) == ("gone", at(1))
    again = enabled(at(2))
    assert reported(again, GONE, "a", at(1)) == again
    assert reported(again, GONE, "a", at(3)).disabled == "gone"


def test_a_disabled_endpoint_stays_so_until_somebody_enables_it() -> None:
    gone = reported(enabled(START), GONE, "a", at(1))
    assert reported(gone, OK, "b", at(2)) == gone


@pytest.mark.parametrize("kind", ["config", "ambiguous", "expired", "opted_out"])
def test_what_is_no_fault_of_the_endpoint_says_nothing_of_it(kind) -> None:
    health = enabled(START)
    assert reported(health, Outcome(kind=kind), "a", at(1)) == health


@given(reports)
def test_a_state_can_be_stored(entries) -> None:
    health = fold(entries)
    assert msgspec.json.decode(msgspec.json.encode(health), type=Health) == health
