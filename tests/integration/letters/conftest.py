"""What tests of dead letters share: a world with all stores behind a worker."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from engine.jobs.redisclaims import RedisClaims
from engine.postgres import Pool
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.letters import World
from tests.support.logs import FAST, connected


@pytest.fixture
async def world(nats_server: NatsServer, valkey: Valkey, pool: Pool) -> AsyncIterator[World]:
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        claims = RedisClaims(redis)
        yield World(broker, redis, claims, pool)
        await claims.close()
