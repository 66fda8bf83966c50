"""The document of all controls in force and of the last changes: what the control bucket holds under one key.

One document, because every process reads all of it twice a second, two operators are told from each other by one revision, and
what is restored leaves nothing behind.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from engine.plan.rules import Channel

PREFIX: Final = "controls."
KEY: Final = "document"
"""Where the document is in the control bucket: the key, and what stands before it."""

BYTES_MAX: Final = 48 << 10
"""Of the document: its stream takes messages of 64 KiB, and every process reads it twice a second. Room for some 150 controls."""

CHANGES_KEPT: Final = 32
"""Changes that the document remembers, until they are rows of `control_log` and all gateways have obeyed them."""

CHANGE_SECONDS_MIN: Final = 10.0
"""The oldest change kept is at least this old before it gives way: processes read twice a second, and commands that came in
quick succession must not push out what one of them has not read yet."""

NAME_CHARS_MAX: Final = 128

Lane = Literal["critical", "normal", "bulk"]
Mode = Literal["hold", "drop"]
Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Why = Annotated[str, Meta(min_length=1, max_length=200)]
PerMinute = Annotated[int, Meta(ge=0, le=10_000_000)]
Percent = Annotated[int, Meta(ge=0, le=100)]


class Kill(msgspec.Struct, frozen=True, tag_field="kind", tag="kill", omit_defaults=True):
    """A kill switch: nothing that all of its members name is sent.

    Args:
        mode: `hold`: jobs are put back and go when it is restored; `drop`: they end as `killed`.
        percent: of the users who are let through again, always the same ones; more of them with a higher number.
    """

    tenant: Name | None = None
    channel: Channel | None = None
    provider: Name | None = None
    category: Name | None = None
    mode: Mode = "hold"
    percent: Percent = 0

    @property
    def scope(self) -> tuple[str | None, ...]:
        """What it is known by: there is one kill switch with the same members."""
        return ("kill", self.tenant, self.channel, self.provider, self.category)

    @property
    def name(self) -> str:
        """What the reason `killed:<switch>` and people call it."""
        named = (self.tenant, self.channel, self.provider, self.category)
        words = ("tenant", "channel", "provider", "category")
        return ",".join(f"{word}={value}" for word, value in zip(words, named, strict=True) if value)


class Pause(msgspec.Struct, frozen=True, tag_field="kind", tag="pause", omit_defaults=True):
    """A lane that waits: of one channel, or of all. What comes meanwhile is accepted, and goes when it is restored."""

    lane: Lane
    channel: Channel | None = None

    @property
    def scope(self) -> tuple[str | None, ...]:
        """What it is known by."""
        return ("pause", self.lane, self.channel)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"lane={self.lane}" + (f",channel={self.channel}" if self.channel else "")


class Throttle(msgspec.Struct, frozen=True, tag_field="kind", tag="throttle", omit_defaults=True):
    """How many events a tenant's services may publish over HTTP in a minute.

    Args:
        type: of these only: a type (`order.shipped`), or all that begin with some words (`order.*`).
        per_minute: over all gateways; 0: none.
    """

    tenant: Name
    per_minute: PerMinute
    type: Name | None = None

    @property
    def scope(self) -> tuple[str | None, ...]:
        """What it is known by."""
        return ("throttle", self.tenant, self.type)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"tenant={self.tenant}" + (f",type={self.type}" if self.type else "")


class Rehydrate(msgspec.Struct, frozen=True, tag_field="kind", tag="rehydrate", omit_defaults=True):
    """Connected devices of a user, or of all users of a tenant, read their log again. It is done once and stays nowhere."""

    tenant: Name
    user: Name | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"tenant={self.tenant}" + (f",user={self.user}" if self.user else "")


Control = Kill | Pause | Throttle
"""What stays in force until it is restored."""

Action = Literal["kill", "pause", "throttle", "restore", "rehydrate"]


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """What somebody has changed.

    Args:
        number: counts the changes of this document.
        at: Unix time, by the clock of whoever made it.
        after: what is in force now, or was done once; none: `before` was restored wholly.
        before: what was in force.
    """

    id: str
    number: int
    at: float
    who: str
    why: str
    action: Action
    after: Control | Rehydrate | None = None
    before: Control | None = None


class InForce(msgspec.Struct, frozen=True):
    """A control, and since when it is as it is, by whom and why."""

    control: Control
    at: float
    who: str
    why: str


class Document(msgspec.Struct, frozen=True):
    """All controls in force, oldest first, and the last changes, newest last."""

    controls: tuple[InForce, ...] = ()
    changes: tuple[Change, ...] = ()

    def find(self, scope: tuple[str | None, ...]) -> InForce | None:
        """The control with this scope."""
        return next((each for each in self.controls if each.control.scope == scope), None)
