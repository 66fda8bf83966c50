"""What endpoints of a tenant's configuration share: places, and how processes are told of a change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from engine.directory.bell import ring
from engine.directory.changes import Change, changing, changing_in
from gateway.access.shares import Shares
from gateway.api.directory import Version, directory_of
from gateway.context import Context
from gateway.limits import DIRECTORY_SECONDS, RULE_REQUESTS, RULE_REQUESTS_PER_TENANT

PLACES: Final = Shares(RULE_REQUESTS, RULE_REQUESTS_PER_TENANT)
"""Of a process."""


class VersionQuery(msgspec.Struct, frozen=True):
    """`version`: change it only if it still has this one; 0: only if there is none. Left out: whichever there is."""

    version: Version | None = None


class Deletion(msgspec.Struct):
    """`deleted`: false where there was nothing to delete."""

    deleted: bool


@asynccontextmanager
async def rules_changing(context: Context, tenant: str, user: str | None = None) -> AsyncIterator[Change]:
    """A transaction that may change a tenant's rules; afterwards every process is told of it.

    `user`: whose profile changes by it, too.
    """
    directory = directory_of(context)
    if user is None:
        async with changing(directory.pool, tenant, DIRECTORY_SECONDS) as change:
            yield change
    else:
        async with (
            directory.changing(tenant, [user], DIRECTORY_SECONDS) as profiles,
            changing_in(profiles.connection, tenant) as change,
        ):
            await profiles.check_there(user)
            yield change
            profiles.touch(user)
    if change.made:
        await ring(context.broker)
