"""Changing suppressions, and with them the profiles of all users who have one of the addresses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from engine.directory.changing import Directory
from engine.directory.contacts import Addressed
from engine.directory.suppressions import Chosen, find_chosen, lift_chosen, users_of
from engine.limits import SUPPRESSIONS_PER_REQUEST
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


async def lift_some(directory: Directory, tenant: str, chosen: Chosen, seconds: float) -> tuple[int, bool]:
    """Lift up to `SUPPRESSIONS_PER_REQUEST` of the suppressions that are meant; how many, and whether there may be more.

    Raises:
        StoreUnavailable: no answer in time; they may be lifted or not. It may be asked again.
    """
    async with asking(directory.pool, seconds) as connection:
        found = await find_chosen(connection, tenant, chosen, SUPPRESSIONS_PER_REQUEST)
    if not found:
        return 0, False
    addresses = [(one.channel, one.address) for one in found]
    async with changing_suppressions(directory, tenant, addresses, seconds) as connection:
        lifted = await lift_chosen(connection, tenant, chosen, [one.id for one in found])
    return lifted, len(found) == SUPPRESSIONS_PER_REQUEST
