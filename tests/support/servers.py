"""Fixtures over real servers. Every test gets servers of its own, except PostgreSQL, where it gets a database of its own.

A nats-server starts in some 30 ms and Valkey in 50 ms, so nothing is gained by sharing them, and a test may kill, suspend
and restart what it was given. They are killed at the end of the test: none of their data is needed any more. PostgreSQL is
told to end instead, so that it gives back the shared memory it holds.
"""

import asyncio
import contextlib
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import asyncpg
import pytest

from ops.dev.child import ServerFailed
from ops.dev.servers import NatsCluster, NatsServer, Postgres, Valkey
from ops.migrate import migrate
from tests.support.memory import in_memory
from tests.support.overlays import FORGETFUL, UNSYNCED

DATABASE_SECONDS = 40.0
"""For making or dropping a database."""

CONNECT_SECONDS = 20.0

END_SECONDS = 20.0
"""How long the end of a PostgreSQL that nobody needs any more may take."""

AT_THE_END: Final = contextlib.ExitStack()
"""Closed when a session is over, in no test's time: under load the end of a server has taken a minute."""


@pytest.fixture
def nats_server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NatsServer]:
    """An empty nats-server as shipped, with the overlay that a mark `overlay` names."""
    marker = request.node.get_closest_marker("overlay")
    server = NatsServer(tmp_path / "nats", overlay=marker.args[0] if marker else ())
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def fresh_nats_server(nats_server: NatsServer) -> NatsServer:
    """The same as `nats_server`, for tests that kill or suspend it and want to say so."""
    return nats_server


@pytest.fixture
def nats_cluster(tmp_path: Path) -> Iterator[NatsCluster]:
    """Three empty nats-servers as shipped that have formed a cluster; its `url` is the administrator's."""
    cluster = NatsCluster(tmp_path / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """An empty Valkey that forgets everything when it ends; `valkey.url`."""
    server = Valkey(tmp_path / "valkey", overlay=FORGETFUL)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def end(server: Postgres) -> None:
    """End it at once: the last checkpoint of an orderly end would write what nobody reads any more.

    One that was killed starts again first, as shared memory outlives a SIGKILL.
    """
    if server.child.exit_code == -signal.SIGKILL:
        server.start()
    server.stop_signal = server.death_signal
    server.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Postgres:
    """The PostgreSQL all tests of a session share (no fsync). Most tests want `postgres` instead."""
    # What a server that had to be killed has left may still be written to for a moment.
    temporary = tempfile.TemporaryDirectory(prefix="seamark-postgres-", dir=in_memory(), ignore_cleanup_errors=True)
    server = Postgres(Path(AT_THE_END.enter_context(temporary)), overlay=UNSYNCED)
    AT_THE_END.callback(_end_somehow, server)
    server.start()
    return server


def _end_somehow(server: Postgres) -> None:
    server.stop_seconds_max = END_SECONDS
    with contextlib.suppress(ServerFailed):  # every test has had its say
        end(server)


@pytest.fixture
async def empty_postgres(postgres_server: Postgres) -> AsyncIterator[str]:
    """URL of an empty database that only this test knows."""
    async with _database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_template(postgres_server: Postgres) -> str:
    """The database, with the schema and no row, that others are made from: six times as fast as migrating each."""
    name = "seamark_template"
    asyncio.run(_make_template(postgres_server, name))
    return name


async def _make_template(server: Postgres, name: str) -> None:
    admin = await asyncpg.connect(server.url, timeout=CONNECT_SECONDS)
    await admin.execute(f"CREATE DATABASE {name}")
    await admin.close(timeout=CONNECT_SECONDS)
    await migrate(server.database_url(name))


@pytest.fixture
async def postgres(postgres_server: Postgres, postgres_template: str) -> AsyncIterator[str]:
    """URL of a database with the schema and no row that only this test knows."""
    # Copied as files: the server would else write every page to its log first, at twice the cost.
    async with _database(postgres_server, f"TEMPLATE {postgres_template} STRATEGY FILE_COPY") as url:
        yield url


@asynccontextmanager
async def _database(server: Postgres, made_from: str = "") -> AsyncIterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(server.url, timeout=CONNECT_SECONDS)
    try:
        await admin.execute(f"CREATE DATABASE {name} {made_from}", timeout=DATABASE_SECONDS)
        yield server.database_url(name)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)", timeout=DATABASE_SECONDS)
    finally:
        await admin.close(timeout=CONNECT_SECONDS)


@pytest.fixture
async def pool(postgres: str) -> AsyncIterator[asyncpg.Pool]:
    """Connections to `postgres`; one that is still in use at the end fails the test."""
    pool = await asyncpg.create_pool(postgres, min_size=1, max_size=2)
    try:
        yield pool
        async with asyncio.timeout(20):
            await pool.close()
    finally:
        pool.terminate()
