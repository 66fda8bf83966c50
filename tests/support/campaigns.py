"""Campaigns of one tenant, as tests of their table write them down."""

from typing import Any

import msgspec

from engine.campaigns.draft import Audience, Draft, Message
from engine.campaigns.states import Position
from engine.postgres import Pool

T = "t1"
"""The tenant."""

MESSAGE = Message(type="sale.autumn", data=msgspec.Raw(b'{"text":"hi","n":1.0}'))
AT = Position("bbbbbbbb", 7)
"""Where a page was stored."""


async def join(pool: Pool, topic: str, *users: str, tenant: str = T) -> None:
    """Make these users members."""
    await pool.executemany(
        "INSERT INTO topic_members (tenant, topic, user_id) VALUES ($1, $2, $3)", [(tenant, topic, u) for u in users]
    )


def draft(audience: Audience, id: str = "c0", **more: Any) -> Draft:
    """What somebody asks for."""
    return Draft(id=id, audience=audience, message=MESSAGE, **more)
