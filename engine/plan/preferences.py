"""What a user wants, as one JSON document, and what a tenant has as default for all its users: the same document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec

from engine.plan.hours import Windows
from engine.plan.rules import Channel
from seamark.protocol.events import Label

Choice = Literal["on", "off", "digest", "instant"]
"""`on`: as the type's rule says; `off`: not at all; `digest`: together with others, and `instant`: alone, whatever it says."""

Choices = dict[Channel | Literal["*"], Choice]
"""The choice of each channel; `*` is every channel that is not named."""

Quietable = Literal["push", "email", "sms"]
QUIETABLE: tuple[Quietable, ...] = ("push", "email", "sms")
"""Channels that can disturb a person: what is shown in an app makes no noise, and a webhook's receiver is a machine."""


class QuietHours(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """When the channels named stay silent: what is due then is sent when the window ends."""

    windows: Windows = ()
    channels: tuple[Quietable, ...] = QUIETABLE


class Preferences(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The document. A type wins over a category, a category over a channel, and all three over the tenant's.

    Args:
        channels: choices for everything.
        categories: choices for the notifications of a category.
        types: choices for a type, or for all that match a pattern (`order.*`); the longer one wins.
        quiet_hours: in the user's own time; `{}` is none at all, whatever the tenant's are.
        locale, timezone: in place of those that the tenant's directory has of the user.
    """

    channels: Choices = {}
    categories: dict[Label, Choices] = {}
    types: dict[Label, Choices] = {}
    quiet_hours: QuietHours | None = None
    locale: Annotated[str, msgspec.Meta(max_length=35)] | None = None
    timezone: Annotated[str, msgspec.Meta(max_length=64)] | None = None


_LATER: Final = ("digest", "instant")
"""Choices that say when to send: a record is shown in the app as soon as it is stored."""


def check_choices(document: Preferences, before: Preferences | None = None) -> None:
    """Pass choices that a channel can obey.

    Args:
        before: the document that this one replaces: who changes one line answers for no other.

    Raises:
        ValueError: one of them is none; the message names the member.
    """
    kept = {} if before is None else dict(_lines(before))
    for path, line in _lines(document):
        choice = line.get("inapp")
        if choice in _LATER and kept.get(path, {}).get("inapp") != choice:
            said = f"`{path}.inapp` cannot be {choice}, as the app shows a record as soon as it is stored"
            raise ValueError(f'{said}: write on, or off (counts where a type\'s rule says `inapp = "optional"`)')


def _lines(document: Preferences) -> Iterator[tuple[str, Choices]]:
    """Each line of choices, by where it stands."""
    yield "channels", document.channels
    for category, line in document.categories.items():
        yield f"categories.{category}", line
    for pattern, line in document.types.items():
        yield f"types.{pattern}", line


class TenantDefaults(Preferences, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The document of a tenant: what holds for users who have said nothing.

    Args:
        send_windows: outside of these nothing is sent that could disturb a person; none: any time. In the user's time.
        version: counts the changes of the document.
    """

    send_windows: Windows = ()
    version: int = 0
