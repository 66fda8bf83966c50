"""Changing suppressions, and with them the profiles of all users who have one of the addresses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from engine.directory.changing import Directory
from engine.directory.contacts import Addressed
from engine.directory.suppressions import users_of
from engine.postgres import Connection, asking


@asynccontextmanager
async def changing_suppressions(
    directory: Directory, tenant: str, addresses: Sequence[tuple[Addressed, str]], seconds: float
) -> AsyncIterator[Connection]:
    """A transaction that changes suppressions of these addresses.

    Args:
        seconds: how long each of its steps may take.

    Raises:
        StoreUnavailable: no answer in time; the outcome may be unknown.
    """
    async with asking(directory.pool, seconds) as connection:
        users = await users_of(connection, tenant, addresses)
    async with directory.changing(tenant, users, seconds) as change:
        yield change.connection
        for user in users:
            change.touch(user)
    # A user may have got the address since: then his profile may have been read before this was stored.
    async with asking(directory.pool, seconds) as connection:
        since = await users_of(connection, tenant, addresses) - users
    if since:
        async with directory.changing(tenant, since, seconds) as change:
            for user in since:
                change.touch(user)
