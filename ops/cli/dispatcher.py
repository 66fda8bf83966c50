"""`seamark dispatcher`: the role that turns events into records."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from engine.settings import Settings, load_settings

if TYPE_CHECKING:
    from ops.process import Health


def dispatcher() -> None:
    """Run a dispatcher. Start two or more: one works on a partition, the others stand by."""
    from ops.process import run_role

    settings = load_settings()
    sys.exit(run_role("dispatcher", settings, lambda stop, health: _dispatch(settings, stop, health)))


async def _dispatch(settings: Settings, stop: asyncio.Event, health: Health) -> None:
    from engine.controls.watching import watched_controls
    from engine.dispatch.dispatcher import run
    from ops.process import stores

    async with stores("dispatcher", settings, health) as (broker, redis), watched_controls(broker) as controls:
        health.also(controls.not_ready)
        await run(broker, redis, partitions=settings.partitions, controls=controls, stop=stop)
