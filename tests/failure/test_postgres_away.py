"""PostgreSQL goes away, or falls silent; projectors are killed: records flow on, and the tables catch up without loss."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest

from bench.machine import _family
from engine.broker.jetstream import Broker, Outgoing
from engine.topology import server as topology
from ops.dev.servers import Postgres
from ops.migrate import migrate
from projections.verify.tables import Verification
from seamark.protocol.records import state_record
from seamark.protocol.subjects import encode_token, log_stream, log_subject, partition_of
from tests.support.chaos import SECONDS
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import FAST, connected, dispatching, eventually, publish
from tests.support.projections import ProjectorProcess
from tests.support.servers import end
from tests.support.tables import projecting_tables

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300 + 5 * SECONDS)]

PARTITIONS = 4
AWAY_SECONDS = max(6.0, SECONDS)
BACKLOG = 6_000


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Postgres]:
    """A PostgreSQL of the test's own, with the schema."""
    server = Postgres(tmp_path / "postgres")
    try:
        server.start()
        await migrate(server.url)
        yield server
    finally:
        if server.child.alive:
            tell(_family([server.pid]), signal.SIGCONT)
        end(server)


def silence(server: Postgres) -> Callable[[], None]:
    """Every process of it stands still, connections stay open; returns what ends that."""
    pids = _family([server.pid])
    tell(pids, signal.SIGSTOP)
    return lambda: tell(pids, signal.SIGCONT)


def tell(pids: list[int], what: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a backend whose connection has just ended
            os.kill(pid, what)


def crash(server: Postgres) -> Callable[[], None]:
    server.kill()
    return server.start


async def folded(pool: asyncpg.Pool, broker: Broker) -> bool:
    try:
        rows = await pool.fetch(
            "SELECT partition, seq FROM projection_checkpoints WHERE projection = 'inbox'", timeout=5
        )
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
        return False
    at = {row["partition"]: row["seq"] for row in rows}
    for p in range(PARTITIONS):
        newest = await broker.leader_last(log_stream(p), f"log.{p}.>")
        if newest is not None and at.get(p, 0) < newest.seq:
            return False
    return True


async def differences(broker: Broker, pool: asyncpg.Pool, projection: str = "inbox") -> list:
    work = Verification(broker, pool, projection, PARTITIONS)
    return [one async for one in work.differences()]


async def deliver_live(gateway: TestGateway, seconds: float) -> int:
    """Publish for a while, each event when the record of the one before is on the device. How many there were."""
    sent, acked, until = 0, 0.0, time.monotonic() + seconds
    async with gateway.device() as device:
        await device.until("live")
        while time.monotonic() < until:
            await publish(gateway.broker, to=["alice", "bob"], type="demo.hello", id=f"away-{time.monotonic_ns()}")
            frame = await device.until("record")
            sent += 1
            if time.monotonic() - acked > 0.25:  # as often as an SDK does: a device may send 600 frames in a minute
                acked = time.monotonic()
                await device.say("ack", cursor=frame["cursor"])
    return sent


@pytest.mark.parametrize("away", [crash, silence])
async def test_without_postgres_records_flow_on_and_afterwards_the_tables_lack_nothing(
    nats_server, valkey, database: Postgres, away: Callable[[Postgres], Callable[[], None]]
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
    options = {"postgres_url": database.url, "redis_url": valkey.url}
    async with (
        dispatching(nats_server.url, valkey.url),
        projecting_tables(nats_server.url, valkey.url, database.url),
        gateway_on(nats_server, topology_ready=True, **options) as gateway,
    ):
        await deliver_live(gateway, 0.5)
        back = away(database)
        try:
            assert await deliver_live(gateway, AWAY_SECONDS) > AWAY_SECONDS
            async with gateway.device(cursor=None, name="new") as device:
                assert not (await device.until("ready"))["resumed"]
                assert await device.records(1), "what the log holds is not kept from it"
                await device.until("live")
        finally:
            back()
        pool = await asyncpg.create_pool(database.url, min_size=0, max_size=2)
        await eventually(lambda: folded(pool, gateway.broker), seconds=60)
        assert await differences(gateway.broker, pool) == []
        rows = await pool.fetch("SELECT user_id, count(*) AS n FROM inbox GROUP BY user_id")
        assert len({row["n"] for row in rows}) == 1, "alice and bob were told the same"
        pool.terminate()


class Projector(ProjectorProcess):
    """A projector with tables."""

    postgres_url = ""

    def settings(self) -> dict[str, str]:
        return {**super().settings(), "SEAMARK_POSTGRES_URL": self.postgres_url}


async def write(broker: Broker, rng: random.Random, count: int) -> None:
    """Records of many users in batches, some of them read and archive marks."""
    batches: dict[int, list[Outgoing]] = {}
    for number in range(count):
        user = f"user-{rng.randrange(40)}"
        p = partition_of("default", encode_token(user), PARTITIONS)
        id = f"{rng.randrange(1 << 40)}-{number}"
        if rng.random() < 0.1:
            kind = rng.choice(["read", "archive"])
            _, body = state_record(kind, tenant="default", user=user, device="d", up_to=rng.randrange(20_000))
        else:
            body = b'{"id":"%b","kind":"notification","tenant":"default","user":"%b","at":"2026-01-31T12:00:00Z"%b}' % (
                id.encode(), user.encode(), b',"collapse_key":"k"' if rng.random() < 0.2 else b"")  # fmt: skip
        batches.setdefault(p, []).append(Outgoing(log_subject(p, "default", user), body))
    for messages in batches.values():
        await broker.commit(messages, timeout_seconds=30)


@pytest.mark.chaos(takes_seconds=30)
async def test_projectors_killed_in_the_midst_of_batches_lose_nothing_and_count_nothing_twice(
    nats_server, valkey, postgres: str, tmp_path: Path, rng: random.Random
) -> None:
    kills = 20 if SECONDS else 5
    processes = [Projector(f"projector-{i}", tmp_path, nats_server.url, valkey.url) for i in range(2)]
    try:
        async with connected(nats_server.url) as broker:
            await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
            pool = await asyncpg.create_pool(postgres, min_size=1, max_size=2)
            for process in processes:
                process.postgres_url = postgres
                await asyncio.to_thread(process.start)
            over = asyncio.Event()
            reached = "SELECT coalesce(sum(seq), 0) FROM projection_checkpoints WHERE projection = 'inbox'"

            async def load() -> None:
                written = 0
                while not over.is_set():
                    await write(broker, rng, 500)
                    written += 500
                    # Always some batches ahead, and never so far that a slow machine needs minutes for the rest.
                    while not over.is_set() and written - await pool.fetchval(reached) > BACKLOG:
                        await asyncio.sleep(0.02)

            loading = asyncio.create_task(load())
            for number in range(kills):
                victim = processes[number % 2]
                await asyncio.sleep(rng.uniform(0.3, 1.0))
                victim.kill()
                before = await pool.fetchval(reached)
                moved = (
                    "SELECT bool_and(seq > 0) AND sum(seq) > $1 FROM projection_checkpoints WHERE projection = 'inbox'"
                )
                await eventually(lambda q=moved, b=before: pool.fetchval(q, b), seconds=60)
                await asyncio.to_thread(victim.start)
            over.set()
            await loading
            await eventually(lambda: folded(pool, broker), seconds=90)
            assert await differences(broker, pool) == []
            pool.terminate()
    finally:
        for process in processes:
            process.kill()
