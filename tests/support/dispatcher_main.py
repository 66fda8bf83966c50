"""A dispatcher as a process of its own, configured as the command is, with its metrics on SEAMARK_HEALTH_PORT."""

import asyncio
import os
import signal

import prometheus_client
import structlog
import uvloop
from redis.asyncio import Redis

from engine.dispatcher import run
from engine.jetstream import NatsSettings, connect


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    broker = await connect(NatsSettings(os.environ["SEAMARK_NATS_URL"], name="dispatcher"))
    try:
        async with Redis.from_url(os.environ["SEAMARK_REDIS_URL"]) as redis:
            prometheus_client.start_http_server(int(os.environ["SEAMARK_HEALTH_PORT"]), "127.0.0.1")
            await run(broker, redis, stop=stop)
    finally:
        await broker.close()


if __name__ == "__main__":
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    )
    uvloop.run(main())
