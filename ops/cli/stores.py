"""Connections of commands that look into the projections: where the settings say, else the development stack's."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import InvalidSetting
from engine.settings import given_settings, load_settings
from ops.cli.target import nats_settings, read_dev_file

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from engine.broker.jetstream import Broker
    from engine.postgres import Pool

POOL_CONNECTIONS = 4
CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Stores:
    """What a command has at hand."""

    broker: Broker
    pool: Pool
    redis: Redis
    partitions: int


@contextlib.asynccontextmanager
async def stores(folder: Path, name: str) -> AsyncIterator[Stores]:
    """Open connections, closed at the end.

    Raises:
        Unavailable, InvalidSetting: with the remedy.
    """
    from redis.asyncio import Redis

    from engine.broker.jetstream import connect
    from engine.log.incarnations import read_partitions
    from engine.postgres import lazy_pool

    postgres_url, redis_url = urls(folder)
    broker = await connect(nats_settings(folder, name))
    pool = await lazy_pool(postgres_url, POOL_CONNECTIONS, connect_seconds=CONNECT_SECONDS)
    try:
        async with Redis.from_url(redis_url, socket_connect_timeout=2, socket_timeout=None) as redis:
            yield Stores(broker, pool, redis, await read_partitions(broker))
    finally:
        pool.terminate()
        await broker.close()


def trace_url(folder: Path) -> str | None:
    """Where traces can be looked at; None: nobody has said so."""
    if "nats_url" not in given_settings():
        return read_dev_file(folder).trace_url
    return load_settings().trace_url


def urls(folder: Path) -> tuple[str, str]:
    """The addresses of PostgreSQL and Redis."""
    if "nats_url" not in given_settings():
        stack = read_dev_file(folder)
        return stack.postgres_url, stack.redis_url
    settings = load_settings()
    if settings.postgres_url is None:
        raise InvalidSetting("SEAMARK_POSTGRES_URL is not set")
    return settings.postgres_url.reveal(), settings.redis_url.reveal()
