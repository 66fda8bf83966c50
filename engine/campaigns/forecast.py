"""What would be decided about a campaign's notifications: by the planner's function, for recipients drawn at random."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from engine.campaigns.commands import Campaigns
from engine.campaigns.draft import Draft, event_id
from engine.plan.decide import plan
from engine.plan.decisions import Facts, Kill, Notification
from engine.plan.gathering import TenantRules, gathered
from engine.plan.profile import Profile

SAMPLE_USERS: Final = 200
"""Recipients that are looked at: some 400 questions of a millisecond, and shares are right within some percent."""

ASKING: Final = 4
"""Profiles read at a time: half of a gateway's connections are left to others."""


class Forecast(msgspec.Struct, frozen=True):
    """What was decided for so many recipients: by channel, how often which decision (`never: no_token`)."""

    sample: int
    decisions: dict[str, dict[str, int]]


async def forecast(
    campaigns: Campaigns,
    tenant: str,
    draft: Draft,
    rules: TenantRules,
    profile_of: Callable[[str], Awaitable[Profile]],
    drops: Callable[[str], tuple[Kill, ...]],
) -> Forecast:
    """Decide for a sample of the recipients; for all of them where they are few. Nothing is stored.

    Args:
        drops: the kill switches that are set for a user.

    Raises:
        InvalidCampaign, StoreUnavailable: as `Campaigns.size`.
    """
    users: Sequence[str] = await campaigns.sample(tenant, draft, SAMPLE_USERS)
    asking, message, now = asyncio.Semaphore(ASKING), draft.message, datetime.now(UTC)

    async def read(user: str) -> Profile:
        async with asking:
            return await profile_of(user)

    decisions: dict[str, Counter[str]] = {}
    for user, profile in zip(users, await asyncio.gather(*map(read, users)), strict=True):
        notification = Notification(
            id=event_id(draft.id, 0),
            tenant=tenant,
            user=user,
            type=message.type,
            category=message.category,
            priority=message.priority or "normal",
            channels=None if message.channels is None else tuple(message.channels),
            expires_at=message.expires_at,
        )
        inputs = gathered(notification, Facts(stored_at=now), rules, profile, drops(user), now)
        for channel, decision in plan(inputs).items():
            decisions.setdefault(channel, Counter())[f"{decision.when}: {decision.why}"] += 1
    return Forecast(len(users), {channel: dict(counts) for channel, counts in sorted(decisions.items())})
