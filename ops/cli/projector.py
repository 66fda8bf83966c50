"""`seamark projector`: the role that folds logs and receipts into counts and tables."""

from __future__ import annotations

import asyncio
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
    import asyncpg

    from ops.process import stores
    from projections.projector import run

    pool = None
    try:
        if settings.postgres_url is not None:
            # Connects when first needed: a database that is away delays its projections, not the others.
            pool = asyncpg.create_pool(
                settings.postgres_url.reveal(), min_size=0, max_size=POOL_CONNECTIONS_MAX, timeout=5, command_timeout=60
            )
            await pool
        async with stores("projector", settings, health) as (broker, redis):
            await run(broker, redis, pool, partitions=settings.partitions, stop=stop)
    finally:
        if pool is not None:
            pool.terminate()
