"""All that a decision is made from, put together: one function for planner and `explain`, so that both see the same."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

import msgspec

from engine.plan.decisions import Facts, Inputs, Kill, Notification
from engine.plan.preferences import TenantDefaults
from engine.plan.profile import Profile
from engine.plan.rules import Channel, TypeRule


class TenantRules(Protocol):
    """What a tenant says of its notifications."""

    @property
    def defaults(self) -> TenantDefaults:
        """What holds for users who have said nothing."""

    def rule_of(self, type: str, /) -> TypeRule | None:
        """The rule of a type, if it has one."""

    def templates_of(self, type: str, /) -> tuple[Channel, ...]:
        """The channels for which a type has a template."""

    def webhook_of(self, type: str, /) -> bool:
        """Whether an endpoint of the tenant itself gets this type."""


def gathered(
    notification: Notification,
    facts: Facts,
    rules: TenantRules,
    profile: Profile,
    kills: tuple[Kill, ...],
    now: datetime,
) -> Inputs:
    """What a plan is made from. An endpoint of the tenant gets the notifications of all its users."""
    type = notification.type
    if "webhook" not in profile.reach and rules.webhook_of(type):
        profile = msgspec.structs.replace(profile, reach=(*profile.reach, "webhook"))
    return Inputs(
        now=now,
        notification=notification,
        facts=facts,
        rule=rules.rule_of(type),
        profile=profile,
        defaults=rules.defaults,
        templates=rules.templates_of(type),
        kills=kills,
    )
