"""What a tenant says of its notifications: by which channels a type goes, and how."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from engine.plan.hours import Digest
from seamark.protocol.events import Label, Priority, Semantics

Channel = Literal["inapp", "push", "email", "sms", "webhook"]
CHANNELS: tuple[Channel, ...] = ("inapp", "push", "email", "sms", "webhook")

WEEK_SECONDS = 7 * 86_400


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


class TypeRule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is done with notifications of a type.

    Args:
        pattern: a type (`order.shipped`), or all that begin with some words (`order.*`); the longer one wins.
        category: of notifications whose event names none.
        channels: the channels besides `inapp`, or `inapp` itself to say more of it. What is not named here is not used.
        priority: of notifications whose event says `normal`.
        semantics, ttl_seconds: for the channels, where the event says nothing.
        inapp: `optional`: users may switch off that connected devices show it; the record is in their log either way.
        version: counts the changes of the rule.
    """

    pattern: str
    category: Label | None = None
    channels: dict[Channel, ChannelRule] = {}
    priority: Priority | None = None
    semantics: Semantics | None = None
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1)] | None = None
    inapp: Literal["always", "optional"] = "always"
    version: int = 0
