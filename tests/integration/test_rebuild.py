"""A rebuild gives what the incremental fold gave, shows readers nothing half-built, and keeps what the log has lost."""

import asyncio
import json
from bisect import bisect_right
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import asyncpg
import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.topology import server as topology
from projections.inbox.queries import Filter, InboxQueries
from projections.rebuild.tables import Rebuild
from projections.rebuild.unread import rebuild_unread
from projections.unread import store as unread_store
from projections.verify.tables import Verification
from projections.verify.unread import UnreadVerification
from seamark.protocol.records import state_record
from seamark.protocol.subjects import encode_token, log_stream, log_subject, partition_of, receipt_subject
from tests.support.logs import FAST, connected, eventually
from tests.support.tables import projecting_tables, stored_deliveries, stored_inbox

PARTITIONS = 4
USERS = [f"user-{n}" for n in range(12)]


class House(NamedTuple):
    broker: Broker
    pool: asyncpg.Pool
    redis: Redis
    nats_url: str
    redis_url: str
    postgres_url: str


@pytest.fixture
async def house(nats_server, valkey, postgres, monkeypatch) -> AsyncIterator[House]:
    monkeypatch.setattr(unread_store, "REDIS_SECONDS", 20.0)
    pool = await asyncpg.create_pool(postgres, min_size=1, max_size=6)
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        yield House(broker, pool, redis, nats_server.url, valkey.url, postgres)
    pool.terminate()


def partition(user: str, tenant: str = "default") -> int:
    return partition_of(encode_token(tenant), encode_token(user), PARTITIONS)


async def append(house: House, user: str, id: str, tenant: str = "default", **more: Any) -> int:
    record = {"id": id, "kind": "notification", "tenant": tenant, "user": user, "at": "2026-01-31T12:00:00Z",
              "plan": {"inapp": {"when": "now", "why": "default"}}, **more}  # fmt: skip
    subject = log_subject(partition(user, tenant), tenant, user)
    return (await house.broker.append(subject, json.dumps(record).encode())).seq


async def read(house: House, user: str, **what: Any) -> None:
    _, record = state_record("read", tenant="default", user=user, device="phone", **what)
    await house.broker.append(log_subject(partition(user), "default", user), record)


async def acknowledge(house: House, user: str, after: int, up_to: int) -> None:
    epoch = (await house.broker.stream(log_stream(partition(user)))).epoch
    body = {"user": user, "channel": "inapp", "device": "phone", "state": "acknowledged", "epoch": epoch,
            "after": after, "up_to": up_to, "at": "2026-01-31T12:00:01Z"}  # fmt: skip
    await house.broker.append(receipt_subject(partition(user), "default", user), json.dumps(body).encode())


async def fill(house: House, rounds: int = 8) -> None:
    for number in range(rounds):
        for user in USERS:
            seq = await append(house, user, f"{user}-{number}", collapse_key="k" if number % 3 else None)
            await acknowledge(house, user, seq - 1, seq)
        await append(house, "eve", f"eve-{number}", tenant="other")
        await read(house, USERS[number % len(USERS)], ids=[f"{USERS[number % len(USERS)]}-{number}"])
    await read(house, USERS[0], up_to=5)


async def folded(house: House) -> bool:
    """Whether the live version has come to the end of every stream."""
    rows = await house.pool.fetch(
        "SELECT c.stream, c.partition, c.seq FROM projection_checkpoints c JOIN projection_versions v"
        " USING (projection, version)"
    )
    at = {(row["stream"], row["partition"]): row["seq"] for row in rows}
    for p in range(PARTITIONS):
        for stream, subject in ((log_stream(p), f"log.{p}.>"), ("RECEIPTS", f"rcpt.{p}.>")):
            newest = await house.broker.leader_last(stream, subject)
            if newest is not None and at.get((stream, p), 0) < newest.seq:
                return False
    return True


async def differences(house: House, projection: str) -> list[Any]:
    work = Verification(house.broker, house.pool, projection, PARTITIONS)
    return [one async for one in work.differences()]


def rebuilding(house: House, projection: str, **options: Any) -> Rebuild:
    return Rebuild(house.broker, house.pool, projection, PARTITIONS, **options)


async def both(house: House) -> tuple[Any, Any]:
    return await stored_inbox(house.pool), await stored_deliveries(house.pool)


async def test_a_rebuild_gives_what_the_incremental_fold_gave(house: House) -> None:
    await fill(house)
    async with projecting_tables(house.nats_url, house.redis_url, house.postgres_url):
        await eventually(lambda: folded(house))
    before = await both(house)
    for projection in ("inbox", "deliveries"):
        assert await differences(house, projection) == []
        done = await rebuilding(house, projection).run()
        assert (done.version, done.carried) == (2, 0)
        assert done.records > 0
        assert await differences(house, projection) == []
    assert await both(house) == before


async def test_while_readers_read_and_records_come_a_rebuild_shows_every_row_at_every_moment(house: House) -> None:
    await fill(house)
    queries, looks_min = InboxQueries(house.pool, PARTITIONS), 20
    async with projecting_tables(house.nats_url, house.redis_url, house.postgres_url):
        await eventually(lambda: folded(house))
        over = asyncio.Event()
        seen = []

        async def look() -> None:
            while not over.is_set():
                page = await queries.page("default", "user-1", Filter(archived=None), limit=100_000, seconds=30)
                seen.append((len(page.rows), page.checkpoint.seq))

        async def write() -> None:
            number = 0
            while not over.is_set():
                await append(house, "user-1", f"more-{number}")
                number += 1
                await asyncio.sleep(0.005)

        tasks = [asyncio.create_task(look()), asyncio.create_task(write())]
        rebuilds = 0
        while rebuilds < 3 or len(seen) < looks_min:
            await rebuilding(house, "inbox").run()
            rebuilds += 1
        over.set()
        await asyncio.gather(*tasks)
        await eventually(lambda: folded(house), seconds=30)
    rows = [row for row in await stored_inbox(house.pool) if row["user_id"] == "user-1"]
    seqs = sorted(row["seq"] for row in rows if row["superseded_seq"] is None)
    away = [(count, seq) for count, seq in seen if count != bisect_right(seqs, seq)]
    assert away == [], "rows were away for a moment"
    assert [seq for _, seq in seen] == sorted(seq for _, seq in seen), "readers were taken back"
    assert await differences(house, "inbox") == []


async def test_rows_that_age_has_taken_from_the_log_are_carried_over_and_said_to_be(house: House) -> None:
    await fill(house)
    async with projecting_tables(house.nats_url, house.redis_url, house.postgres_url):
        await eventually(lambda: folded(house))
    before = await both(house)
    p = partition("user-1")
    last = (await house.broker.stream(log_stream(p))).last_seq
    await house.broker.api(f"STREAM.PURGE.{log_stream(p)}", {"seq": last // 2})
    done = await rebuilding(house, "inbox").run()
    assert done.carried > 0
    assert await both(house) == before
    carried = await house.pool.fetchval("SELECT count(*) FROM inbox WHERE carried")
    assert carried == done.carried
    assert await differences(house, "inbox") == []


async def test_one_tenant_is_rebuilt_in_place(house: House) -> None:
    await fill(house)
    async with projecting_tables(house.nats_url, house.redis_url, house.postgres_url):
        await eventually(lambda: folded(house))
    before = await both(house)
    await house.pool.execute("UPDATE inbox SET type = 'wrong' WHERE id LIKE 'user-1-%'")
    await house.pool.execute("UPDATE inbox SET type = 'wrong' WHERE tenant = 'other'")
    await house.pool.execute("DELETE FROM delivery_ranges WHERE user_id = 'user-2'")
    assert len(await differences(house, "inbox")) == 8 + 8
    assert len(await differences(house, "deliveries")) == 8
    for projection in ("inbox", "deliveries"):
        await rebuilding(house, projection, tenant="default").run()
    assert {one.key[0] for one in await differences(house, "inbox")} == {"other"}
    await rebuilding(house, "inbox", tenant="other").run()
    assert await both(house) == before
    versions = await house.pool.fetch("SELECT version FROM projection_versions WHERE projection <> 'unread'")
    assert {row["version"] for row in versions} == {1}


async def test_rows_of_a_former_incarnation_of_the_log_come_before_all_of_the_new_one(house: House) -> None:
    await fill(house, rounds=2)
    async with projecting_tables(house.nats_url, house.redis_url, house.postgres_url):
        await eventually(lambda: folded(house))
    for p in range(PARTITIONS):
        await house.broker.api(f"STREAM.DELETE.{log_stream(p)}")
    await topology.ensure(house.broker, "dev", PARTITIONS, overrides=FAST)
    await append(house, "user-1", "afterwards")
    await rebuilding(house, "inbox").run()
    page = await InboxQueries(house.pool, PARTITIONS).page("default", "user-1", Filter(archived=None))
    assert [json.loads(bytes(row))["id"] for row in page.rows] == ["afterwards", "user-1-1", "user-1-0"]
    async with projecting_tables(house.nats_url, house.redis_url, house.postgres_url):
        await append(house, "user-1", "later still")
        await eventually(lambda: folded(house))
    assert await differences(house, "inbox") == []


async def test_unread_counts_are_rebuilt_beside_the_live_ones(house: House) -> None:
    await fill(house)
    async with projecting_tables(house.nats_url, house.redis_url, house.postgres_url):
        await eventually(lambda: folded(house))

        async def same() -> bool:
            work = UnreadVerification(house.broker, house.redis, PARTITIONS)
            return [one async for one in work.differences()] == [] and work.result.compared == len(USERS) + 1

        await eventually(same)
        done = await rebuild_unread(house.broker, house.redis, PARTITIONS)
        assert done.version == 2
        await append(house, "user-1", "afterwards")
        await eventually(same)
