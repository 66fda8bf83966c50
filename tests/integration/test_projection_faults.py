"""A fault is not an outage: it stops the partition with the reason, and how far the fold is behind shows meanwhile."""

import json
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from engine import metrics
from engine.partition import reader as partition
from engine.partition.reader import Phase
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections import runner
from projections.inbox.table import InboxStore
from projections.projection import Projection
from projections.runner import ProjectionWorker
from projections.store import Checkpoint
from projections.unread.store import meta_key
from tests.support.logs import FAST, at_work, connected, eventually
from tests.support.tables import projecting_tables

SUBJECT = "log.0.default.alice"


def record(id: str, **more: Any) -> bytes:
    return json.dumps({"id": id, "kind": "notification", **more}).encode()


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def stopped(consumer: str) -> bool:
    return value("seamark_partition_stopped", stream="LOG-0", consumer=consumer) == 1


def lag(projection: str) -> float:
    return value("seamark_projection_lag_seconds", projection=projection, stream="LOG-0", subject="log.0.>")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(partition, "STOPPED_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(runner, "LAG_SECONDS", 0.2)


@pytest.fixture(autouse=True)
def _unstopped():
    """Whatever an earlier test of this process has left."""
    for consumer in ("inbox-0", "unread-0", "deliveries-0"):
        metrics.partition("LOG-0", consumer).stopped.set(0)


async def test_a_constraint_stops_the_partition_with_the_reason_while_the_lag_rises_and_once_mended_it_goes_on(
    nats_server: NatsServer, valkey: Valkey, pool: asyncpg.Pool, postgres: str, capsys
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        await pool.execute("ALTER TABLE inbox ADD CONSTRAINT only_good CHECK (type <> 'bad')")

        async def folded(count: int) -> bool:
            return await pool.fetchval("SELECT count(*) FROM inbox") == count

        async def mended() -> bool:
            try:
                await pool.execute("ALTER TABLE inbox DROP CONSTRAINT only_good")
            except asyncpg.DeadlockDetectedError:
                return False  # the projector tries all the while
            return True

        async with projecting_tables(nats_server.url, valkey.url, postgres, 1):
            await broker.append(SUBJECT, record("e1", type="good"))
            await eventually(lambda: folded(1))
            await broker.append(SUBJECT, record("e2", type="bad"))
            await eventually(lambda: stopped("inbox-0"))
            before = lag("inbox")
            await eventually(lambda: lag("inbox") > before + 1)
            assert await folded(1)
            assert not stopped("unread-0"), "another projection stopped, too"
            await eventually(mended)
            await eventually(lambda: folded(2))
            await eventually(lambda: not stopped("inbox-0") and lag("inbox") == 0)
    said = capsys.readouterr()
    assert "only_good" in said.out + said.err
    assert (said.out + said.err).count("partition_stopped") == 1


async def test_a_fault_of_redis_stops_the_partition_and_an_error_of_a_fold_does_not_end_the_process(
    nats_server: NatsServer, valkey: Valkey, pool: asyncpg.Pool, postgres: str, monkeypatch
) -> None:
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        faults = ["of ours"]

        async def apply(store: InboxStore, *args: Any) -> bool:
            if faults:
                raise KeyError(*faults)
            return await good(store, *args)

        good = InboxStore.apply
        monkeypatch.setattr(InboxStore, "apply", apply)
        checkpoints = meta_key(0, 1)
        await redis.set(checkpoints, "no hash")
        async with projecting_tables(nats_server.url, valkey.url, postgres, 1):
            await broker.append(SUBJECT, record("e1"))
            await eventually(lambda: stopped("unread-0") and stopped("inbox-0"))
            await redis.delete(checkpoints)
            await eventually(lambda: redis.exists(checkpoints))
            faults.clear()

            async def folded() -> bool:
                return await pool.fetchval("SELECT count(*) FROM inbox") == 1

            await eventually(folded)


async def test_a_partition_without_an_owner_shows_how_old_what_waits_is(
    nats_server: NatsServer, pool: asyncpg.Pool
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        epoch = (await broker.stream("LOG-0")).epoch or ""
        worker = ProjectionWorker(broker, Projection("waiting", "log"), 0, InboxStore(pool, 0))
        store = InboxStore(pool, 0)
        await store.checkpoint()
        standby: Any = SimpleNamespace(phase=Phase.STANDBY)
        async with at_work(worker.watch_lag(standby), "lag"):
            first = (await broker.append(SUBJECT, record("e1"))).seq
            await eventually(lambda: lag("waiting") > 0.5)
            second = (await broker.append(SUBJECT, record("e2"))).seq
            delivered = SimpleNamespace(
                subject=SUBJECT.encode(), seq=first, time_nanoseconds=10**18, headers=b"", payload=record("e1")
            )
            batch: Any = [delivered]
            assert await store.apply(batch, None, Checkpoint(epoch, first))
            before = lag("waiting")
            await eventually(lambda: lag("waiting") > before)
            batch = [SimpleNamespace(**{**vars(delivered), "seq": second, "payload": record("e2")})]
            assert await store.apply(batch, Checkpoint(epoch, first), Checkpoint(epoch, second))
            await eventually(lambda: lag("waiting") == 0)
