"""What would be decided about an event for a user, and from what: by the planner's function, and nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec
from msgspec import UNSET, UnsetType

from engine.plan.decide import narrowed, plan, wakes
from engine.plan.decisions import Inputs, Notification, Stage
from seamark.protocol.events import Accepted


class Explained(msgspec.Struct, frozen=True):
    """A decision. `again_at`: when it is made once more, as the stage `again_as`; left out where this is the last."""

    when: str
    why: str
    again_at: datetime | UnsetType = UNSET
    again_as: Stage | UnsetType = UNSET


class Explanation(msgspec.Struct, frozen=True):
    """The plan, and all that it was made from: the same function gives the same plan for these inputs, whenever it is asked."""

    plan: Mapping[str, Explained]
    inputs: Inputs


def notification_of(accepted: Accepted, user: str) -> Notification:
    """What a decision needs to know of an event."""
    event, at = accepted.event, accepted.at
    return Notification(
        id=event.id,
        tenant=at.tenant,
        user=user,
        type=at.type,
        category=event.category,
        priority=event.priority,
        channels=None if event.channels is None else tuple(event.channels),
        expires_at=event.expires_at,
    )


def explain(inputs: Inputs) -> Explanation:
    """The plan of these inputs, with what it was made from."""
    explained = {}
    for channel, decision in plan(inputs).items():
        woken = wakes(decision, inputs)
        stage, at = woken if woken is not None else (UNSET, UNSET)
        explained[channel] = Explained(decision.when, decision.why, again_at=at, again_as=stage)
    return Explanation(explained, narrowed(inputs))
