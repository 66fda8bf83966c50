"""`seamark planner`: the role that decides by which channels records go to their users, and when."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from engine.settings import Settings, load_settings

if TYPE_CHECKING:
    from engine.plan.decisions import Kill
    from ops.process import Health

POOL_CONNECTIONS_MAX = 8
"""Profiles that Redis does not have are read from PostgreSQL, so many at once; more of them wait for a connection."""


def planner() -> None:
    """Run a planner. Start two or more: one plans a log, the others stand by."""
    from ops.process import run_role

    settings = load_settings()
    sys.exit(run_role("planner", settings, lambda stop, health: _plan(settings, stop, health)))


async def _plan(settings: Settings, stop: asyncio.Event, health: Health) -> None:
    from engine.cancels import watching
    from engine.controls.watching import watched_controls
    from engine.directory.rules import Rules
    from engine.log.incarnations import read_partitions
    from engine.partition.head import read_pin_timeout
    from engine.planner import position
    from engine.planner.planner import Planner
    from engine.profiles.cache import ProfileCache
    from engine.profiles.reader import SharedReads
    from engine.tasks import run_until
    from ops.process import database, stores

    async with (
        database(settings, POOL_CONNECTIONS_MAX, "planners read rules and users there") as pool,
        stores("planner", settings, health) as (broker, redis),
        watched_controls(broker) as controls,
        watching(broker) as cancels,
    ):
        reads = SharedReads(pool)
        rules, profiles = Rules(pool, broker), ProfileCache(redis, reads.read)

        def drops(tenant: str, user: str) -> tuple[Kill, ...]:
            return controls.controls.drops(tenant, user)  # those of this moment

        rules.start()
        health.also(controls.not_ready)
        partitions = await read_partitions(broker, settings.partitions)
        pin_timeout = await read_pin_timeout(broker, position.source(0))
        work = Planner(
            broker, pool, rules, profiles, drops, partitions, cancels=cancels, pin_timeout_seconds=pin_timeout
        )
        try:
            await run_until(stop, work.run(), name="planner")
        finally:
            await rules.close()
            await profiles.close()
            await reads.close()
