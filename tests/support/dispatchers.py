"""Fixtures of failure scenarios around dispatchers: a broker with the topology, and one or two dispatchers at work on it."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.logs import FAST, connected
from tests.support.roles import DispatcherProcess


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    """A connection to `nats_server`, which has the topology with short time-outs."""
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


@pytest.fixture
def only(broker: Broker, nats_server: NatsServer, valkey: Valkey, tmp_path: Path) -> Iterator[DispatcherProcess]:
    """The only dispatcher, at work."""
    with _at_work("only", nats_server, valkey, tmp_path) as process:
        yield process


@pytest.fixture
def first(broker: Broker, nats_server: NatsServer, valkey: Valkey, tmp_path: Path) -> Iterator[DispatcherProcess]:
    """One of two dispatchers, at work."""
    with _at_work("first", nats_server, valkey, tmp_path) as process:
        yield process


@pytest.fixture
def second(
    first: DispatcherProcess, nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> Iterator[DispatcherProcess]:
    """The other one, started when `first` could work: it stands by where that one owns."""
    with _at_work("second", nats_server, valkey, tmp_path) as process:
        yield process


@contextlib.contextmanager
def _at_work(name: str, nats_server: NatsServer, valkey: Valkey, folder: Path) -> Iterator[DispatcherProcess]:
    process = DispatcherProcess(name, folder, nats_server.url, valkey.url)
    try:
        process.start()
        yield process
    finally:
        process.kill()
