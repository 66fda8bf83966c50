"""What a user's document and the tenant's say of a channel, and which of their lines says it."""

from __future__ import annotations

from typing import Final, Literal, cast

import msgspec

from engine.plan.patterns import patterns_of
from engine.plan.preferences import Choice, Choices, Preferences, TenantDefaults
from engine.plan.rules import Channel, TypeRule

Source = Literal[
    "always",
    "user_type",
    "user_category",
    "user_channel",
    "tenant_type",
    "tenant_category",
    "tenant_channel",
    "rule",
    "no_rule",
]
"""Where an effective value comes from, the strongest first. `always`: the rule lets nobody switch it off."""


class Effective(msgspec.Struct, frozen=True, gc=False):
    """What holds for a channel, and where it comes from."""

    choice: Choice
    source: Source


def effective(
    channel: str, type: str, category: str | None, rule: TypeRule | None, user: Preferences, tenant: TenantDefaults
) -> Effective:
    """The choice that holds: of type, category or channel in the user's document, else in the tenant's, else the rule's.

    Within a document the pattern that says most of the type wins; within a line the channel's name wins over `*`.
    """
    if channel == "inapp":
        if rule is None or rule.inapp == "always":
            return Effective("on", "always")
    elif rule is None or channel not in rule.channels:
        return Effective("off", "no_rule")
    said = _said(channel, type, category, user, _USER) or _said(channel, type, category, tenant, _TENANT)
    if said is not None:
        # `*` may say `digest` for all channels. The app cannot wait: a record is shown as soon as it is stored.
        return Effective("on", said.source) if channel == "inapp" and said.choice != "off" else said
    line = rule.channels.get(cast("Channel", channel))
    return Effective("on" if line is None else line.default, "rule")


_USER: Final[tuple[Source, Source, Source]] = ("user_type", "user_category", "user_channel")
_TENANT: Final[tuple[Source, Source, Source]] = ("tenant_type", "tenant_category", "tenant_channel")


def _said(
    channel: str, type: str, category: str | None, document: Preferences, names: tuple[Source, Source, Source]
) -> Effective | None:
    of_type, of_category, of_channel = names
    if document.types:
        for pattern in patterns_of(type):
            if (choice := _of(channel, document.types.get(pattern))) is not None:
                return Effective(choice, of_type)
    if category is not None and (choice := _of(channel, document.categories.get(category))) is not None:
        return Effective(choice, of_category)
    choice = _of(channel, document.channels)
    return None if choice is None else Effective(choice, of_channel)


def _of(channel: str, line: Choices | None) -> Choice | None:
    return line.get(cast("Channel", channel), line.get("*")) if line else None
