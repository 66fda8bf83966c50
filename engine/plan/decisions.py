"""A decision: when one channel is used for one notification, and why. And what it is made from."""

from __future__ import annotations

from datetime import datetime, timedelta, tzinfo
from typing import Final, Literal, get_args

import msgspec

from engine.plan.hours import zone_of
from engine.plan.preferences import TenantDefaults
from engine.plan.profile import Profile
from engine.plan.rules import TypeRule
from seamark.protocol.events import Priority

Why = Literal[
    "default",
    "requested",
    "critical",
    "user_on",
    "user_off",
    "tenant_off",
    "category_off",
    "type_off",
    "quiet_hours",
    "send_window",
    "digest",
    "escalation",
    "no_address",
    "no_token",
    "suppressed",
    "opted_out",
    "expired",
    "cancelled",
    "recalled",
    "superseded",
    "user_deleted",
    "killed",
    "throttled",
    "duplicate",
    "seen_in_app",
    "all_read",
    "no_rule",
    "no_template",
]
"""Every reason there is. `suppressed` and `killed` are followed by a colon and which one: `suppressed:hard_bounce`."""

WHYS: frozenset[str] = frozenset(get_args(Why))

Stage = Literal["first", "escalation", "digest", "quiet_hours", "send_window", "cap", "retry"]
"""What has woken the decision: `first` is the planner's, the others are schedules that have fired."""

ESCALATION: Final = "escalation"
"""The stage of what is sent unless the notification has been seen."""


class Decision(msgspec.Struct, frozen=True, gc=False):
    """When, and why.

    Args:
        when: `now`, `at:<time>`, `unless_seen:<seconds>`, `digest:<category>/<end of the window>` or `never`.
        why: one of `Why`.
    """

    when: str
    why: str


class Notification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a decision needs to know of a record.

    Args:
        channels: the channels that its event asks for; none: those of the rule.
    """

    id: str
    tenant: str
    user: str
    type: str
    category: str | None = None
    priority: Priority = "normal"
    channels: tuple[str, ...] | None = None
    expires_at: datetime | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What has become of the notification so far.

    Args:
        stored_at: when the log stored the record: never a time that its publisher says.
        stage: what has woken this decision.
        seen: a device has shown it; read, archived: the user has done so.
        capped_until: the channel's cap is exhausted until then; none: it is not.
    """

    stored_at: datetime
    stage: Stage = "first"
    seen: bool = False
    read: bool = False
    archived: bool = False
    cancelled: bool = False
    recalled: bool = False
    superseded: bool = False
    duplicate: bool = False
    capped_until: datetime | None = None


class Kill(msgspec.Struct, frozen=True, omit_defaults=True):
    """A kill switch in mode `drop` that is set for the tenant. One in mode `hold` keeps jobs and decides nothing.

    Args:
        switch: its name, which the reason `killed:<switch>` repeats.
        channel, category: what it is about; none: everything.
    """

    switch: str
    channel: str | None = None
    category: str | None = None

    def holds(self, channel: str, category: str | None) -> bool:
        """Whether it stops `channel` for a notification of `category`."""
        return self.channel in {None, channel} and self.category in {None, category}


class Inputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """All that a decision is made from: who has these bytes can make it again, and gets the same.

    Args:
        now: when the decision is made.
        rule: of the notification's type; none: there is none.
        templates: channels for which the type has an active template.
        kills: the tenant's switches.
        throttled: the tenant has so many jobs waiting that it gets no more such for now; what is critical has a larger share.
    """

    now: datetime
    notification: Notification
    facts: Facts
    rule: TypeRule | None = None
    profile: Profile = Profile()
    defaults: TenantDefaults = TenantDefaults()
    templates: tuple[str, ...] = ()
    kills: tuple[Kill, ...] = ()
    throttled: bool = False

    @property
    def category(self) -> str | None:
        """The notification's, or the one its rule gives it."""
        if self.notification.category is None and self.rule is not None:
            return self.rule.category
        return self.notification.category

    @property
    def critical(self) -> bool:
        """Whether this goes by all channels of the rule at once, whatever the user has chosen."""
        said = self.notification.priority
        if said == "normal" and self.rule is not None:
            return self.rule.priority == "critical"
        return said == "critical"

    @property
    def expires_at(self) -> datetime | None:
        """From when on no channel sends it any more."""
        if self.notification.expires_at is None and self.rule is not None and self.rule.ttl_seconds is not None:
            return self.facts.stored_at + timedelta(seconds=self.rule.ttl_seconds)
        return self.notification.expires_at

    @property
    def zone(self) -> tzinfo:
        """The user's time: what he has chosen, what the directory has, what the tenant has."""
        return zone_of(self.profile.preferences.timezone, self.profile.timezone, self.defaults.timezone)
