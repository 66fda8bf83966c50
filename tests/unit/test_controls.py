"""Controls: what a change makes of the document, what is refused by name, and what the document means for whoever sends."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.controls.changing import Asked, InvalidControl, TooManyChanges, change
from engine.controls.document import (
    BYTES_MAX,
    CHANGE_SECONDS_MIN,
    CHANGES_KEPT,
    Control,
    Document,
    Kill,
    Pause,
    Rehydrate,
    Throttle,
)
from engine.controls.view import GO, Controls, Verdict, let_through

PUSH = Kill(channel="push")


def changed(
    document: Document,
    target: Control | Rehydrate,
    *,
    restore: bool = False,
    percent: int | None = None,
    now: float = 0.0,
) -> Document:
    return change(document, Asked(target, "ops", "outage", restore, percent), id=f"c{now}", now=now)


def after(*targets: Control) -> Document:
    """The document with these controls, an hour apart."""
    document = Document()
    for hour, target in enumerate(targets):
        document = changed(document, target, now=hour * 3600.0)
    return document


def test_a_change_says_what_was_and_what_is_and_who_and_why() -> None:
    held = changed(Document(), PUSH, now=1.0)
    dropped = changed(held, Kill(channel="push", mode="drop"), now=2.0)
    assert [each.control for each in dropped.controls] == [Kill(channel="push", mode="drop")]
    first, second = dropped.changes
    assert (first.number, first.action, first.before, first.after) == (1, "kill", None, PUSH)
    assert (second.number, second.before, second.after) == (2, PUSH, Kill(channel="push", mode="drop"))
    assert {(each.who, each.why) for each in dropped.changes} == {("ops", "outage")}


def test_a_kill_switch_is_restored_in_steps_and_never_backwards() -> None:
    document = after(PUSH)
    for percent in (10, 50):
        document = changed(document, Kill(channel="push"), restore=True, percent=percent)
        assert [each.control for each in document.controls] == [Kill(channel="push", percent=percent)]
    with pytest.raises(InvalidControl) as refused:
        changed(document, Kill(channel="push"), restore=True, percent=20)
    assert refused.value.field == "percent"
    document = changed(document, Kill(channel="push"), restore=True, percent=100)
    assert document.controls == ()
    assert document.changes[-1].after is None
    assert document.changes[-1].before == Kill(channel="push", percent=50)


@pytest.mark.parametrize("before", [0, 10])
def test_restoring_no_percent_of_the_users_never_takes_the_switch_off(before: int) -> None:
    document = after(Kill(channel="sms", percent=before))
    with pytest.raises(InvalidControl, match=f"{before} already") as refused:
        changed(document, Kill(channel="sms"), restore=True, percent=0)
    assert refused.value.field == "percent"


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_share_that_there_cannot_be_is_refused(percent: int) -> None:
    with pytest.raises(InvalidControl, match="0 to 100"):
        changed(after(PUSH), PUSH, restore=True, percent=percent)


def test_only_kill_switches_are_restored_step_by_step() -> None:
    with pytest.raises(InvalidControl, match="only kill switches"):
        changed(after(Pause("bulk")), Pause("bulk"), restore=True, percent=10)


def test_restoring_keeps_the_mode_of_the_switch() -> None:
    document = changed(after(Kill(channel="sms", mode="drop")), Kill(channel="sms"), restore=True, percent=10)
    assert document.controls[0].control == Kill(channel="sms", mode="drop", percent=10)


def test_who_is_let_through_stays_so_and_the_share_is_that_of_the_percentage() -> None:
    users = [f"user-{number}" for number in range(5_000)]
    before: set[str] = set()
    for percent in (10, 50, 99):
        through = {user for user in users if let_through(Kill(channel="push", percent=percent), "acme", user)}
        assert before <= through
        assert abs(len(through) / len(users) - percent / 100) < 0.03
        before = through
    assert not any(let_through(PUSH, "acme", user) for user in users)


INVALID: dict[str, tuple[Any, str]] = {
    "a switch for everything": (Kill(), "tenant"),
    "the channel of the log": (Kill(channel="inapp"), "channel"),
    "the lane of the log": (Pause("bulk", "inapp"), "channel"),
    "a tenant that is none": (Kill(tenant="x" * 129), "tenant"),
    "a tenant with a NUL": (Throttle("a\0b", 1), "tenant"),
    "a provider that cannot be printed": (Kill(provider="a\nb"), "provider"),
    "a type that is none": (Throttle("acme", 1, "order shipped"), "type"),
    "a pattern in the midst": (Throttle("acme", 1, "order.*.x"), "type"),
    "a user that is none": (Rehydrate("acme", "topic:news"), "user"),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_cannot_be_obeyed_is_refused_with_the_field_at_fault(case: str) -> None:
    target, field = INVALID[case]
    with pytest.raises(InvalidControl) as refused:
        changed(Document(), target)
    assert refused.value.field == field
    assert f"`{field}`" in str(refused.value)


@pytest.mark.parametrize("why", ["", "  ", "x" * 201, "two\nlines"])
def test_nothing_is_changed_without_a_reason_that_others_can_read(why: str) -> None:
    with pytest.raises(InvalidControl) as refused:
        change(Document(), Asked(PUSH, "ops", why), id="c", now=0.0)
    assert refused.value.field == "why"


def test_what_is_not_in_force_cannot_be_restored() -> None:
    with pytest.raises(InvalidControl, match="not in force"):
        changed(after(Kill(channel="sms")), PUSH, restore=True)


def test_the_document_stays_small_enough_to_be_read_twice_a_second() -> None:
    document, full = Document(), ""
    for count in range(1000):
        try:
            document = changed(document, Throttle("acme", 1, f"type-{count}"), now=count * 3600.0)
        except TooManyChanges as refused:
            full = str(refused)
            break
    assert "restore some" in full
    assert len(document.controls) > 100
    assert len(msgspec.json.encode(document)) <= BYTES_MAX
    assert changed(document, Throttle("acme", 1, "type-0"), restore=True, now=1e9), "restoring is always possible"


def test_no_change_is_pushed_out_before_every_process_has_read_it() -> None:
    document = Document()
    for number in range(CHANGES_KEPT):
        document = changed(document, Rehydrate("acme", f"user-{number}"), now=number * 0.1)
    with pytest.raises(TooManyChanges, match="wait"):
        changed(document, PUSH, now=CHANGES_KEPT * 0.1)
    document = changed(document, PUSH, now=CHANGE_SECONDS_MIN + 0.1)
    assert len(document.changes) == CHANGES_KEPT
    assert document.changes[-1].number == CHANGES_KEPT + 1


def test_a_clock_that_was_wrong_once_keeps_nobody_from_changing_anything() -> None:
    document = changed(Document(), Rehydrate("acme"), now=1e9)
    for number in range(CHANGES_KEPT - 1):
        document = changed(document, Rehydrate("acme", f"user-{number}"), now=100.0 * number)
    assert changed(document, PUSH, now=5_000.0).controls


names = st.sampled_from([None, "a", "b"])
kills = st.builds(
    Kill,
    tenant=names,
    channel=st.sampled_from([None, "push", "email"]),
    provider=names,
    category=names,
    mode=st.sampled_from(["hold", "drop"]),
    percent=st.sampled_from([0, 50, 100]),
).filter(lambda kill: kill.name)


@given(st.lists(kills, max_size=5), names, st.sampled_from(["inapp", "push", "email"]), names, names, st.integers(0, 9))
def test_a_verdict_is_that_of_the_switches_that_name_nothing_else(
    switches: list[Kill], tenant: str | None, channel: str, provider: str | None, category: str | None, user: int
) -> None:
    document = after(*switches)
    at = {"tenant": tenant or "c", "channel": channel, "provider": provider, "category": category}
    verdict = Controls(document).verdict(*at.values(), user=str(user))  # type: ignore[arg-type]
    hitting = [
        each.control
        for each in document.controls
        if channel != "inapp"
        and all(getattr(each.control, name) in (None, value) for name, value in at.items())
        and not let_through(each.control, at["tenant"] or "", str(user))  # type: ignore[arg-type]
    ]
    modes = {each.mode for each in hitting if isinstance(each, Kill)}
    assert verdict.effect == ("hold" if "hold" in modes else "drop" if modes else "go")
    assert (verdict == GO) == (not hitting)


def test_a_planner_is_told_of_the_switches_that_drop_whatever_the_provider() -> None:
    controls = Controls(
        after(
            Kill(channel="push", mode="drop"),
            Kill(tenant="acme", category="promo", mode="drop"),
            Kill(tenant="globex", mode="drop"),
            Kill(provider="fcm", mode="drop"),
            Kill(channel="sms"),
        )
    )
    assert [kill.switch for kill in controls.drops("acme", "alice")] == ["channel=push", "tenant=acme,category=promo"]
    assert controls.verdict("acme", "sms", None, None) == Verdict("hold", "channel=sms")


def test_a_paused_lane_is_that_of_one_channel_or_of_all() -> None:
    controls = Controls(after(Pause("bulk"), Pause("normal", "push")))
    assert controls.paused("bulk")
    assert controls.paused("bulk", "sms")
    assert controls.paused("normal", "push")
    assert not controls.paused("normal")
    assert not controls.paused("normal", "sms")


def test_an_event_is_counted_by_every_throttle_of_its_tenant_that_covers_its_type() -> None:
    whole, order, other = Throttle("acme", 10), Throttle("acme", 5, "order.*"), Throttle("globex", 1)
    exact = Throttle("acme", 0, "order.shipped")
    controls = Controls(after(whole, order, exact, other))
    assert controls.throttles("acme", "order.shipped") == (whole, order, exact)
    assert controls.throttles("acme", "order.shipped.late") == (whole, order)
    assert controls.throttles("acme", "orders") == (whole,)
    assert controls.throttles("initech", "order.shipped") == ()


def test_a_document_is_read_by_an_older_version_that_does_not_know_a_member() -> None:
    written = msgspec.json.encode(after(PUSH)).replace(b'"channel":"push"', b'"channel":"push","newer":1')
    assert msgspec.json.decode(written, type=Document) == after(PUSH)
