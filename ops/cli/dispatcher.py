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
    from redis.asyncio import Redis

    from engine.broker.health import watched
    from engine.broker.jetstream import connect
    from engine.dispatch.dispatcher import run
    from engine.topology.check import report_start

    broker = await connect(settings.nats("seamark-dispatcher"))
    try:
        async with (
            Redis.from_url(settings.redis_url.reveal(), socket_connect_timeout=2, socket_timeout=None) as redis,
            watched(broker, settings.nats_monitor_urls) as stores,
        ):
            health.not_ready = stores.not_ready
            await report_start(broker, settings.profile, settings.nats_monitor_urls)
            await run(
                broker,
                redis,
                partitions=settings.partitions,
                stop=stop,
            )
    finally:
        await broker.close()
