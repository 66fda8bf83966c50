"""Inputs of decisions for tests: one that sends at once by every channel, and generated ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st
from msgspec.structs import replace

from engine.plan.decisions import Facts, Inputs, Kill, Notification
from engine.plan.hours import DAYS, Digest, Window
from engine.plan.preferences import QUIETABLE, Preferences, QuietHours, TenantDefaults
from engine.plan.profile import Profile, Suppression
from engine.plan.rules import CHANNELS, Cap, ChannelRule, TypeRule

NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)
EMPTY = ChannelRule()


def plain(**other: Any) -> Inputs:
    """A notification that goes out by all channels at once."""
    inputs = Inputs(
        now=NOON,
        notification=Notification(id="n", tenant="t", user="alice", type="order.shipped", category="orders"),
        facts=Facts(stored_at=NOON - timedelta(seconds=1)),
        rule=TypeRule(pattern="order.*", channels=dict.fromkeys(("push", "email", "sms", "webhook"), EMPTY)),
        profile=Profile(version=1, reach=CHANNELS),
        templates=("push", "email", "sms"),
    )
    return replace(inputs, **other)


def with_line(inputs: Inputs, channel: str, **line: Any) -> Inputs:
    """The rule's line of a channel says this, too."""
    assert inputs.rule is not None
    lines = {**inputs.rule.channels, channel: replace(inputs.rule.channels[channel], **line)}
    return replace(inputs, rule=replace(inputs.rule, channels=lines))


def with_facts(inputs: Inputs, **facts: Any) -> Inputs:
    return replace(inputs, facts=replace(inputs.facts, **facts))


def with_notification(inputs: Inputs, **members: Any) -> Inputs:
    return replace(inputs, notification=replace(inputs.notification, **members))


def with_profile(inputs: Inputs, **members: Any) -> Inputs:
    return replace(inputs, profile=replace(inputs.profile, **members))


def with_document(inputs: Inputs, whose: str, **members: Any) -> Inputs:
    """The document of the `user` or the `tenant` says this, too."""
    if whose == "tenant":
        return replace(inputs, defaults=replace(inputs.defaults, **members))
    return with_profile(inputs, preferences=replace(inputs.profile.preferences, **members))


_clocks = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.sampled_from((0, 1, 30, 59)))
_days = st.lists(st.sampled_from(DAYS), min_size=1, max_size=7, unique=True).map(tuple)
windows = st.lists(st.builds(Window, start=_clocks, end=_clocks, days=_days), max_size=3).map(tuple)
zones = st.sampled_from(
    (None, "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "no/zone", "../x")
)
_moments = st.datetimes(datetime(2025, 1, 1), datetime(2027, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001 # hypothesis wants them so
_channels = st.sampled_from(CHANNELS)
_categories = st.sampled_from((None, "orders", "a/b", "offers"))
_lines = st.dictionaries(
    st.sampled_from((*CHANNELS, "*")), st.sampled_from(("on", "off", "digest", "instant")), max_size=3
)
_said = {
    "channels": _lines,
    "categories": st.dictionaries(st.sampled_from(("orders", "a/b", "offers")), _lines, max_size=2),
    "types": st.dictionaries(st.sampled_from(("order.shipped", "order.*", "*", "other")), _lines, max_size=3),
    "quiet_hours": st.none()
    | st.builds(
        QuietHours,
        windows=windows,
        channels=st.lists(st.sampled_from(QUIETABLE), unique=True).map(tuple),
    ),
    "timezone": zones,
}
_waits = st.one_of(
    st.just({}),
    st.integers(1, 7 * 86_400).map(lambda seconds: {"unless_seen_seconds": seconds}),
    st.builds(Digest, every=st.sampled_from(("hour", "day", "week")), at=_clocks, day=st.sampled_from(DAYS)).map(
        lambda digest: {"digest": digest}
    ),
)
_rules = st.builds(
    lambda default, cap, waits: ChannelRule(default=default, cap=cap, **waits),
    st.sampled_from(("on", "on", "off")),
    st.none() | st.just(Cap(3, 3600)),
    _waits,
)
_near = st.integers(-90_000, 3 * 86_400).map(lambda seconds: timedelta(seconds=seconds))


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """Anything a decision may be asked about."""
    now = draw(_moments)
    stored_at = now - abs(draw(_near))
    rarely = st.sampled_from((False,) * 7 + (True,))
    return Inputs(
        now=now,
        notification=Notification(
            id="n",
            tenant="t",
            user=draw(st.text(max_size=8)),
            type=draw(st.sampled_from(("order.shipped", "order.shipped.late", "other"))),
            category=draw(_categories),
            priority=draw(st.sampled_from(("normal", "normal", "low", "high", "critical"))),
            channels=draw(st.none() | st.lists(_channels | st.sampled_from(("fax", "")), max_size=4).map(tuple)),
            expires_at=draw(st.none() | _near.map(lambda delta: now + delta)),
        ),
        facts=Facts(
            stored_at=stored_at,
            stage=draw(
                st.sampled_from(
                    ("first", "first", "escalation", "digest", "quiet_hours", "send_window", "cap", "retry")
                )
            ),
            **{
                name: draw(rarely)
                for name in ("seen", "read", "archived", "cancelled", "recalled", "superseded", "duplicate")
            },
            capped_until=draw(st.none() | _near.map(lambda delta: now + delta)),
        ),
        rule=draw(
            st.none()
            | st.builds(
                TypeRule,
                pattern=st.just("*"),
                category=_categories,
                channels=st.dictionaries(_channels, _rules),
                priority=st.sampled_from((None, "normal", "critical")),
                ttl_seconds=st.none() | st.integers(1, 86_400),
                inapp=st.sampled_from(("always", "optional")),
            )
        ),
        profile=draw(
            st.builds(
                Profile,
                timezone=zones,
                preferences=st.builds(Preferences, **_said),
                reach=st.sampled_from((CHANNELS, CHANNELS, ("email",), ())),
                suppressions=st.lists(
                    st.builds(
                        Suppression,
                        channel=_channels,
                        reason=st.sampled_from(("opted_out", "hard_bounce", "complaint")),
                        scope=st.sampled_from(("all", "orders")),
                        expires_at=st.none() | _near.map(lambda delta: now + delta),
                    ),
                    max_size=2,
                ).map(tuple),
                deleted=rarely,
            )
        ),
        defaults=draw(st.builds(TenantDefaults, **_said, send_windows=st.just(()) | windows)),
        templates=draw(st.sampled_from((("push", "email", "sms"), ("push", "email", "sms"), ()))),
        kills=draw(
            st.lists(
                st.builds(
                    Kill, switch=st.sampled_from(("a", "b")), channel=st.none() | _channels, category=_categories
                ),
                max_size=1,
            ).map(tuple)
        ),
    )
