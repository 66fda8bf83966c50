"""`seamark projector`: the role that folds logs and receipts into counts and tables."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

from engine.settings import Settings, load_settings

if TYPE_CHECKING:
    from ops.process import Health

POOL_CONNECTIONS_MAX = 8
"""Partitions whose transactions are on their way at once; more of them wait for a connection."""


def projector() -> None:
    """Run a projector. Start two or more: one folds a partition, the others stand by."""
    from ops.process import run_role

    settings = load_settings()
    sys.exit(run_role("projector", settings, lambda stop, health: _project(settings, stop, health)))


async def _project(settings: Settings, stop: asyncio.Event, health: Health) -> None:
    from ops.process import database, stores
    from projections.projector import run

    async with contextlib.AsyncExitStack() as held:
        pool = None
        if settings.postgres_url is not None:  # without it there are counts, and no tables
            pool = await held.enter_async_context(database(settings, POOL_CONNECTIONS_MAX, "tables are there"))
        broker, redis = await held.enter_async_context(stores("projector", settings, health))
        await run(broker, redis, pool, partitions=settings.partitions, stop=stop)
