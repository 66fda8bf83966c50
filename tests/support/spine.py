"""The whole way of an event on real servers: streams, dispatcher, and gateways that can leave and come back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from engine.broker.jetstream import Broker, NatsSettings
from engine.topology import server as topology
from gateway.context import Context
from gateway.options import GatewayOptions
from gateway.server import run
from tests.support.logs import FAST, connected, dispatching
from tests.support.tokens import SECRET
from tests.support.waiting import ended

API_KEY = "a key for tests"
STOP_SECONDS = 40.0


@dataclass
class RunningGateway:
    """A gateway that serves on `port`."""

    port: int
    context: Context
    _stop: asyncio.Event
    _task: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def leave(self) -> None:
        """Drain and end, as on SIGTERM."""
        self._stop.set()
        async with asyncio.timeout(STOP_SECONDS):
            await self._task


@dataclass
class Spine:
    """What tests of clients need at hand."""

    broker: Broker
    nats_url: str
    postgres_url: str

    @asynccontextmanager
    async def gateway(self, port: int = 0, **options: object) -> AsyncIterator[RunningGateway]:
        """A gateway on `port`, or a free one; a fault of it fails the test."""
        given = GatewayOptions(
            nats=NatsSettings(self.nats_url),
            postgres_url=self.postgres_url,
            **{"jwt_secret": SECRET, "dev": True, "dev_api_key": API_KEY, **options},
        )
        stop = asyncio.Event()
        started: asyncio.Future[tuple[int, Context]] = asyncio.get_running_loop().create_future()
        serving = run(given, stop=stop, port=port, started=lambda *facts: started.set_result(facts))
        task = asyncio.create_task(serving, name="gateway")
        try:
            await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            running = RunningGateway(*started.result(), stop, task)
            yield running
            await running.leave()
        finally:
            await ended(task)


@asynccontextmanager
async def spine(nats_url: str, redis_url: str, postgres_url: str) -> AsyncIterator[Spine]:
    """Streams, an API key and a dispatcher; gateways are started by the test."""
    await _add_api_key(postgres_url)
    async with connected(nats_url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_url, redis_url):
            yield Spine(broker, nats_url, postgres_url)


async def _add_api_key(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url, timeout=10)
    try:
        await connection.execute(
            "INSERT INTO api_keys (tenant, name, key_hash, scopes) VALUES ('default', 'test', $1, '{events:write}')",
            hashlib.sha256(API_KEY.encode()).digest(),
        )
    finally:
        await connection.close(timeout=10)
