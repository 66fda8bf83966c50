"""Verifying while others are at work, while servers restart, and where every projection follows its own log faithfully."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import asyncpg
import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Postgres, Valkey
from projections import replay
from projections.verify import scan
from projections.verify.tables import Verification
from projections.verify.unread import UnreadVerification
from seamark.protocol.records import state_record
from seamark.protocol.subjects import encode_token, log_stream, log_subject, partition_of, receipt_subject
from tests.support.logs import FAST, connected, eventually
from tests.support.tables import projecting_tables

PARTITIONS = 2
USERS = [f"user-{n}" for n in range(12)]


class House(NamedTuple):
    broker: Broker
    pool: asyncpg.Pool
    redis: Redis
    nats: NatsServer
    valkey: Valkey
    postgres_url: str

    def verification(self, projection: str, progress: Any = replay.no_progress) -> Verification | UnreadVerification:
        if projection == "unread":
            return UnreadVerification(self.broker, self.redis, PARTITIONS, pool=self.pool, progress=progress)
        return Verification(self.broker, self.pool, projection, PARTITIONS, progress=progress)

    async def differences(self, projection: str, progress: Any = replay.no_progress) -> list[Any]:
        return [one async for one in self.verification(projection, progress).differences()]

    async def folded(self) -> bool:
        for p in range(PARTITIONS):
            newest = await self.broker.leader_last(log_stream(p), f"log.{p}.>")
            at = await self.pool.fetchval(
                "SELECT seq FROM projection_checkpoints WHERE projection = 'inbox' AND partition = $1", p
            )
            counted = await self.redis.hget(f"unread:{{{p}:1}}:meta", "seq")
            if newest is not None and (at != newest.seq or int(counted or 0) != newest.seq):
                return False
            receipt = await self.broker.leader_last("RECEIPTS", f"rcpt.{p}.>")
            at = await self.pool.fetchval(
                "SELECT seq FROM projection_checkpoints WHERE projection = 'deliveries' AND partition = $1", p
            )
            if receipt is not None and at != receipt.seq:
                return False
        return True


@pytest.fixture
async def house(nats_server, valkey, pool, postgres) -> AsyncIterator[House]:
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        yield House(broker, pool, redis, nats_server, valkey, postgres)


def partition(user: str) -> int:
    return partition_of(encode_token("default"), encode_token(user), PARTITIONS)


async def append(house: House, user: str, id: str, **more: Any) -> int:
    record = {"id": id, "kind": "notification", "plan": {"inapp": {"when": "now"}}, "category": "mail", **more}
    subject = log_subject(partition(user), "default", user)
    return (await house.broker.append(subject, json.dumps(record).encode())).seq


async def read(house: House, user: str, **what: Any) -> None:
    _, record = state_record("read", tenant="default", user=user, device="phone", **what)
    await house.broker.append(log_subject(partition(user), "default", user), record)


async def acknowledge(house: House, user: str, up_to: int) -> None:
    epoch = (await house.broker.stream(log_stream(partition(user)))).epoch
    body = {"user": user, "channel": "inapp", "device": "phone", "state": "acknowledged", "epoch": epoch,
            "after": up_to - 1, "up_to": up_to, "at": "2026-01-31T12:00:01Z"}  # fmt: skip
    await house.broker.append(receipt_subject(partition(user), "default", user), json.dumps(body).encode())


async def fill(house: House, rounds: int = 6) -> None:
    for number in range(rounds):
        for user in USERS:
            await acknowledge(house, user, await append(house, user, f"{user}-{number}", collapse_key=f"k{number % 4}"))
        await read(house, USERS[number], ids=[f"{USERS[number]}-{number}"])


@pytest.mark.parametrize("projection", ["unread", "inbox", "deliveries"])
async def test_while_records_come_and_are_folded_nothing_differs(house: House, projection: str) -> None:
    await fill(house, 3)
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await eventually(house.folded)
        number, over = 0, asyncio.Event()

        async def write() -> None:
            nonlocal number
            while not over.is_set():
                user = USERS[number % len(USERS)]
                seq = await append(house, user, f"more-{number}", collapse_key=f"k{number % 3}")
                await acknowledge(house, user, seq)
                await read(house, user, up_to=seq - 5)
                number += 1

        writing = asyncio.create_task(write())
        try:
            while number <= 10:
                assert not writing.done(), "it writes until it is told to stop"
                assert await house.differences(projection) == []
        finally:
            over.set()
            await writing


@pytest.mark.parametrize("why", ["expired", "cancelled"])
async def test_what_was_stored_for_nobody_to_see_is_no_difference(house: House, why: str) -> None:
    never = {"when": "never", "why": why}
    await append(house, "user-1", "shown")
    await append(house, "user-1", "never", plan={"inapp": never, "push": never})
    await append(house, "user-1", "partly", plan={"inapp": {"when": "now"}, "push": never})
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await eventually(house.folded)
    rows = {row["id"]: (row["channels"], row["withheld"]) for row in await house.pool.fetch("SELECT * FROM inbox")}
    assert rows == {"shown": (["inapp"], None), "never": ([], why), "partly": (["inapp", "push"], None)}
    assert await house.differences("inbox") == []
    await house.pool.execute("UPDATE inbox SET withheld = NULL WHERE id = 'never'")
    [found] = await house.differences("inbox")
    assert (found.field, found.stored, found.expected) == ("withheld", None, why)


@pytest.mark.parametrize("projection", ["unread", "inbox", "deliveries"])
async def test_a_broker_that_restarts_in_the_midst_of_each_stage_is_waited_for(
    house: House, projection: str, monkeypatch
) -> None:
    monkeypatch.setattr(replay, "SILENCE_SECONDS", 1.0)
    await fill(house)
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await eventually(house.folded)
    if projection == "inbox":
        await house.pool.execute("UPDATE inbox SET type = 'wrong' WHERE id = 'user-3-3'")
    stages: list[str] = []

    def restart(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages.append(stage)
            house.nats.kill()
            house.nats.start()

    found = await house.differences(projection, restart)
    assert len(stages) >= 3
    assert [one.key[1:] for one in found] == ([["user-3", "user-3-3"]] if projection == "inbox" else [])


async def test_a_database_that_restarts_in_the_midst_of_it_is_waited_for(
    nats_server: NatsServer, valkey: Valkey, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(scan, "BLOCKS", 1)
    server = Postgres(tmp_path / "postgres")
    await asyncio.to_thread(server.start)
    try:
        await verification_over_a_restart(nats_server, valkey, server)
    finally:
        await asyncio.to_thread(server.kill)


async def verification_over_a_restart(nats_server: NatsServer, valkey: Valkey, server: Postgres) -> None:
    from ops.migrate import migrate

    await migrate(server.url)
    async with (
        connected(nats_server.url) as broker,
        Redis.from_url(valkey.url) as redis,
        asyncpg.create_pool(server.url, min_size=0, max_size=2) as pool,
    ):
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        house = House(broker, pool, redis, nats_server, valkey, server.url)
        await fill(house)
        async with projecting_tables(nats_server.url, valkey.url, server.url, PARTITIONS):
            await eventually(house.folded)
        restarts = 0

        def restart(stage: str, done: int, total: int) -> None:
            nonlocal restarts
            if stage == "table inbox" and restarts < 2:
                restarts += 1
                server.kill()
                server.start()

        work = house.verification("inbox", restart)
        assert [one async for one in work.differences()] == []
        assert restarts == 2
        assert work.result.compared == 6 * len(USERS)


async def test_a_count_and_a_list_that_disagree_are_a_difference_though_each_follows_its_own_fold(house: House) -> None:
    await fill(house)
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await eventually(house.folded)
    assert await house.differences("unread") == []
    await house.pool.execute("UPDATE inbox SET read_seq = 1, read_at = now() WHERE id = 'user-5-4'")
    [found] = await house.differences("unread")
    assert (found.what, found.key) == ("unread count and inbox disagree", ["default", "user-5"])
    assert found.stored.count == found.expected + 1


async def test_what_was_published_again_after_the_deduplication_store_was_lost_is_read_in_count_and_list(
    house: House,
) -> None:
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await append(house, "alice", "e1")
        await read(house, "alice", ids=["e1"])
        await append(house, "alice", "e2")
        await append(house, "alice", "e1")  # what a dispatcher does whose claims are gone
        await eventually(house.folded)
        for projection in ("unread", "inbox"):
            assert await house.differences(projection) == []
        unread = await house.pool.fetch("SELECT id FROM inbox WHERE read_seq IS NULL")
        assert [row["id"] for row in unread] == ["e2"]
        prefix = f"unread:{{{partition('alice')}:1}}"
        assert await house.redis.zrange(f"{prefix}:s:default.alice", 0, -1) == [b"e2"]


async def test_a_row_that_stands_twice_or_nowhere_is_a_difference(house: House) -> None:
    await fill(house)
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await eventually(house.folded)
    await house.pool.execute("DELETE FROM inbox WHERE id = 'user-1-1'")
    await house.pool.execute("UPDATE inbox SET id = 'made-up' WHERE id = 'user-2-2'")
    found = {(one.what, one.key[2]) for one in await house.differences("inbox")}
    assert found == {
        ("inbox row is missing", "user-1-1"),
        ("inbox row is missing", "user-2-2"),
        ("inbox row that the stream does not give", "made-up"),
    }


async def test_a_record_that_comes_between_the_list_and_the_count_of_one_who_is_looked_at_closely_is_no_difference(
    house: House, monkeypatch
) -> None:
    listed, looks = UnreadVerification._listed, []

    async def comes(id: str) -> None:
        looks.append(id)
        await append(house, "alice", id)
        await eventually(house.folded)

    async def while_records_come(self: UnreadVerification, *args: Any) -> dict[str, int]:
        if not looks:
            await comes("before the list and after the count")  # who has another count than list is looked at closely
            return await listed(self, *args)
        found = await listed(self, *args)
        if len(looks) == 1:
            await comes("after the list and before the count")
        return found

    monkeypatch.setattr(UnreadVerification, "_listed", while_records_come)
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await append(house, "alice", "first")
        await eventually(house.folded)
        work = house.verification("unread")
        assert [one async for one in work.differences()] == []
    assert (len(looks), work.result.looked_at_closely) == (2, 1)


@pytest.mark.parametrize("projection", ["unread", "inbox", "deliveries"])
async def test_a_record_of_a_name_that_postgres_cannot_hold_keeps_nobody_from_being_verified(
    house: House, projection: str
) -> None:
    await fill(house, 2)
    record = {"id": "e1", "kind": "notification", "plan": {"inapp": {"when": "now"}}}
    for p in range(PARTITIONS):  # as an earlier version has stored it
        await house.broker.append(f"log.{p}.default.nul=00user", json.dumps(record).encode())
    await append(house, "user-0", "newer"), await append(house, "user-1", "newer")
    async with projecting_tables(house.nats.url, house.valkey.url, house.postgres_url, PARTITIONS):
        await eventually(house.folded)
    work = house.verification(projection)
    assert [one async for one in work.differences()] == []
    assert work.result.compared >= len(USERS)
