"""Topics: named groups of users, and who is in them. A member needs no row of his own: any user that has a log can be one.

Whoever changes members holds the row of their topic, so its count is right. Large audiences are joined by many small changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Final

import msgspec

from engine.errors import LimitReached
from engine.limits import TOPIC_MEMBERS_MAX, TOPICS_MAX
from engine.postgres import Connection
from seamark.protocol.limits import TOKEN_BYTES_MAX

TopicName = Annotated[
    str, msgspec.Meta(min_length=1, max_length=TOKEN_BYTES_MAX, pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$(?!\n)")
]
"""As types are called: dot-separated words of letters, digits, _ and -."""

DELETED_AT_ONCE: Final = 10_000
"""Members of a topic that is deleted go so many at a time: no transaction holds the topic for long."""

_HOLD: Final = """
INSERT INTO topics (tenant, name) VALUES ($1, $2) ON CONFLICT (tenant, name) DO UPDATE SET members = topics.members
RETURNING members, (xmax = 0) AS made
"""

_ADD: Final = """
WITH added AS (
    INSERT INTO topic_members (tenant, topic, user_id)
    SELECT $1, $2, id FROM unnest($3::text[]) AS id
    WHERE NOT EXISTS (SELECT FROM profiles WHERE tenant = $1 AND user_id = id AND deleted_at IS NOT NULL)
    ON CONFLICT DO NOTHING RETURNING 1
)
UPDATE topics SET members = members + (SELECT count(*) FROM added) WHERE tenant = $1 AND name = $2
RETURNING members
"""

_REMOVE: Final = """
WITH gone AS (DELETE FROM topic_members WHERE tenant = $1 AND topic = $2 AND user_id = ANY($3) RETURNING 1)
UPDATE topics SET members = members - (SELECT count(*) FROM gone) WHERE tenant = $1 AND name = $2
RETURNING members
"""

_EMPTY: Final = """
WITH gone AS (
    DELETE FROM topic_members WHERE tenant = $1 AND topic = $2 AND user_id IN (
        SELECT user_id FROM topic_members WHERE tenant = $1 AND topic = $2 ORDER BY user_id LIMIT $3) RETURNING 1
)
UPDATE topics SET members = members - (SELECT count(*) FROM gone) WHERE tenant = $1 AND name = $2
RETURNING members
"""


class Topic(msgspec.Struct, frozen=True):
    """A topic, and how many members it has."""

    name: str
    members: int
    created_at: datetime


class Member(msgspec.Struct, frozen=True):
    """A user of a topic."""

    id: str
    added_at: datetime


async def find_topic(connection: Connection, tenant: str, name: str) -> Topic | None:
    """The topic of this name."""
    row = await connection.fetchrow(
        "SELECT name, members, created_at FROM topics WHERE tenant = $1 AND name = $2", tenant, name
    )
    return None if row is None else Topic(**dict(row))


async def page_of_topics(connection: Connection, tenant: str, after: str, limit: int) -> list[Topic]:
    """At most `limit` topics in the order of their names, behind the name `after`; `""` begins."""
    statement = "SELECT name, members, created_at FROM topics WHERE tenant = $1 AND name > $2 ORDER BY name LIMIT $3"
    return [Topic(**dict(row)) for row in await connection.fetch(statement, tenant, after, limit)]


async def page_of_members(connection: Connection, tenant: str, name: str, after: str, limit: int) -> list[Member]:
    """At most `limit` members in the order of their ids, behind the id `after`; `""` begins."""
    statement = """
    SELECT user_id AS id, added_at FROM topic_members WHERE tenant = $1 AND topic = $2 AND user_id > $3 ORDER BY user_id LIMIT $4
    """
    return [Member(**dict(row)) for row in await connection.fetch(statement, tenant, name, after, limit)]


async def add_members(connection: Connection, tenant: str, name: str, users: Sequence[str]) -> int:
    """Have these users in the topic, which is made if there is none; how many members it has then. In a transaction.

    Users who were deleted are passed over: nobody comes back because an old list names him.

    Raises:
        LimitReached: the topic, or the tenant, would have more than there may be.
    """
    row = await connection.fetchrow(_HOLD, tenant, name)
    assert row is not None, "an upsert returns its row"
    if row["made"] and await connection.fetchval("SELECT count(*) FROM topics WHERE tenant = $1", tenant) > TOPICS_MAX:
        raise LimitReached(f"a tenant may have {TOPICS_MAX} topics: delete some, or use attributes of users instead")
    members: int = await connection.fetchval(_ADD, tenant, name, sorted(set(users)))
    if members > TOPIC_MEMBERS_MAX:
        raise LimitReached(f"a topic may have {TOPIC_MEMBERS_MAX} members: split it, or address everyone")
    return members


async def remove_members(connection: Connection, tenant: str, name: str, users: Sequence[str]) -> int | None:
    """Have none of these users in the topic; how many members are left. None: there is no such topic. In a transaction."""
    await connection.execute("SELECT FROM topics WHERE tenant = $1 AND name = $2 FOR UPDATE", tenant, name)
    left: int | None = await connection.fetchval(_REMOVE, tenant, name, sorted(set(users)))
    return left


async def delete_some(connection: Connection, tenant: str, name: str) -> int:
    """Delete the topic with its members, or the first of many; how many are left. In a transaction."""
    await connection.execute("SELECT FROM topics WHERE tenant = $1 AND name = $2 FOR UPDATE", tenant, name)
    left: int = await connection.fetchval(_EMPTY, tenant, name, DELETED_AT_ONCE) or 0
    if not left:
        await connection.execute("DELETE FROM topics WHERE tenant = $1 AND name = $2", tenant, name)
    return left
