"""Whose an address is, as the directory has it now."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Final, NamedTuple

import msgspec

from engine.postgres import Pool, asking, lazy_pool
from ops.dev.outbox.messages import Message
from seamark.protocol.errors import SeamarkError

KNOWN_MAX: Final = 10_000

_FIND: Final = """
SELECT 'email' AS channel, email AS address, user_id, '' AS device FROM users WHERE email = ANY($1)
UNION ALL SELECT 'sms', phone, user_id, '' FROM users WHERE phone = ANY($1)
UNION ALL SELECT 'push', token, user_id, token_id FROM push_tokens WHERE token = ANY($1)
"""


class Owner(NamedTuple):
    """A user, and the id of the token where the address is one."""

    user: str
    device: str = ""


class People:
    """Names the users of messages; made by `people`. What it has found is remembered: a token that is gone was still his."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: dict[tuple[str, str], Owner] = {}

    async def named(self, messages: Iterable[Message]) -> list[Message]:
        """The messages with their users and devices, as far as the directory can be asked."""
        found = list(messages)
        unknown = {one.to for one in found if one.channel != "webhook" and (one.channel, one.to) not in self._known}
        if unknown:
            with contextlib.suppress(SeamarkError):  # the page shows messages while PostgreSQL is away, too
                await self._look_up(unknown)
        return [self._with_owner(one) for one in found]

    async def _look_up(self, addresses: Iterable[str]) -> None:
        async with asking(self._pool) as connection:
            rows = await connection.fetch(_FIND, list(addresses))
        if len(self._known) + len(rows) > KNOWN_MAX:
            self._known.clear()
        for row in rows:
            self._known[row["channel"], row["address"]] = Owner(row["user_id"], row["device"])

    def _with_owner(self, message: Message) -> Message:
        if message.channel == "webhook":
            user = message.shown["body"].get("user")
            return msgspec.structs.replace(message, user=user if isinstance(user, str) else "")
        owner = self._known.get((message.channel, message.to))
        return message if owner is None else msgspec.structs.replace(message, user=owner.user, device=owner.device)


@contextlib.asynccontextmanager
async def people(postgres_url: str) -> AsyncIterator[People]:
    """Asks this database, once somebody wants to know."""
    pool = await lazy_pool(postgres_url, 1, connect_seconds=5)
    try:
        yield People(pool)
    finally:
        pool.terminate()
