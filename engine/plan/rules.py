"""What a tenant says of its notifications: by which channels a type goes, and how."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from engine.plan.hours import Digest
from engine.plan.patterns import check_pattern
from seamark.protocol.events import Label, Priority, Semantics

Channel = Literal["inapp", "push", "email", "sms", "webhook"]
CHANNELS: tuple[Channel, ...] = ("inapp", "push", "email", "sms", "webhook")

WEEK_SECONDS: Final = 7 * 86_400

TTL_SECONDS_MAX: Final = 30 * 86_400
"""As long as the log keeps the record."""


class Cap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most `limit` messages of a channel to one user in `period_seconds`."""

    limit: Annotated[int, msgspec.Meta(ge=1)]
    period_seconds: Annotated[int, msgspec.Meta(ge=1, le=WEEK_SECONDS)]


class ChannelRule(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a type of notification uses one channel. Empty: at once, for everybody who has not switched it off.

    Args:
        default: `off` is for those only who have switched it on.
        unless_seen_seconds: escalation: sent after so long, and only if no device has shown the notification by then.
        digest: not sent alone but together with others of its category.
        cap: how many a user may get by this channel.
    """

    default: Literal["on", "off"] = "on"
    unless_seen_seconds: Annotated[int, msgspec.Meta(ge=1, le=WEEK_SECONDS)] | None = None
    digest: Digest | None = None
    cap: Cap | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where the members do not go together."""
        if self.unless_seen_seconds is not None and self.digest is not None:
            raise ValueError("`unless_seen_seconds` and `digest` exclude each other: leave one out")


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is done with some notifications.

    Args:
        category: of notifications whose event names none.
        channels: the channels besides `inapp`, or `inapp` itself to say more of it. What is not named here is not used.
        priority: of notifications whose event says `normal`.
        semantics, ttl_seconds: for the channels, where the event says nothing.
        inapp: `optional`: users may switch it off, which is decided and shown; the record is in their log either way, and
            connected devices show it. `always`: what they say of `inapp` is passed over.
    """

    category: Label | None = None
    channels: dict[Channel, ChannelRule] = {}
    priority: Priority | None = None
    semantics: Semantics | None = None
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=TTL_SECONDS_MAX)] | None = None
    inapp: Literal["always", "optional"] = "always"


class TypeRule(Rule, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The rule of the types that match a pattern.

    Args:
        pattern: a type (`order.shipped`), all that begin with some words (`order.*`), or `*`; what says more of a type wins.
        version: counts the changes of the rule.
    """

    pattern: str
    version: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError where `pattern` is none."""
        check_pattern(self.pattern)
