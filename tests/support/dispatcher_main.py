"""A dispatcher as a process of its own, configured as the command is, with its metrics on SEAMARK_HEALTH_PORT."""

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

import prometheus_client
import structlog
import uvloop
from redis.asyncio import Redis

from engine import dispatcher
from engine.dispatcher import DispatchWorker
from engine.jetstream import Broker, NatsSettings, Outgoing, PubAck, connect
from engine.rounds import Round


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    broker = await connect(NatsSettings(os.environ["SEAMARK_NATS_URL"], name="dispatcher"))
    try:
        async with Redis.from_url(os.environ["SEAMARK_REDIS_URL"]) as redis:
            prometheus_client.start_http_server(int(os.environ["SEAMARK_HEALTH_PORT"]), "127.0.0.1")
            await dispatcher.run(broker, redis, stop=stop)
    finally:
        await broker.close()


def tell(lie: str) -> None:
    """Take one of the dispatcher's safeguards away: tests must notice."""
    if lie == "no-expectation":
        commit = Broker.commit

        async def unconditional(self: Broker, messages: Sequence[Outgoing], **options: Any) -> PubAck:
            return await commit(self, [message._replace(headers=b"") for message in messages], **options)

        Broker.commit = unconditional  # type: ignore[method-assign]
    elif lie == "no-skip":
        dispatcher.not_covered = lambda entries, mark: list(entries)
    elif lie == "home-first":
        settle = DispatchWorker._settle_round

        async def home_first(self: DispatchWorker, round_: Round) -> None:
            await self._append(self._q, [], round_.last_seq)
            await settle(self, round_)

        DispatchWorker._settle_round = home_first  # type: ignore[method-assign]


if __name__ == "__main__":
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    )
    tell(os.environ.get("TEST_LIE", ""))
    uvloop.run(main())
