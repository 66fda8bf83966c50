"""`seamark dispatcher`: the role that turns events into records."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from engine.settings import Settings, load_settings

if TYPE_CHECKING:
    from seamark.process import Health


def dispatcher() -> None:
    """Run a dispatcher. Start two or more: one works on a partition, the others stand by."""
    from seamark.process import run_role

    settings = load_settings()
    sys.exit(run_role("dispatcher", settings, lambda stop, health: _dispatch(settings, stop, health)))


async def _dispatch(settings: Settings, stop: asyncio.Event, health: Health) -> None:
    from redis.asyncio import Redis

    from engine.brokerhealth import watched
    from engine.dispatcher import run
    from engine.jetstream import connect
    from engine.topology_check import report_start

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
