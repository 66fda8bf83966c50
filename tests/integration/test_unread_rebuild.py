"""Rebuilding and verifying unread counts: no count is wrong for a moment, and what the log has lost still counts."""

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.errors import TopologyError
from engine.partition.reader import Delivered
from engine.topology import server as topology
from projections.folds.unread import Unread
from projections.rebuild import unread as unread_rebuild
from projections.rebuild.unread import rebuild_unread
from projections.replay import replay
from projections.store import Checkpoint
from projections.unread.reader import UnreadReader
from projections.unread.store import UnreadStore, drop_version, read_version, write_version
from projections.verify.unread import UnreadVerification
from seamark.protocol.records import state_record
from tests.support.logs import FAST, connected

EPOCH = "abcdefgh"


class House(NamedTuple):
    broker: Broker
    redis: Redis

    async def append(self, user: str, id: str, **more: Any) -> int:
        body = json.dumps({"id": id, "kind": "notification", **more}).encode()
        return (await self.broker.append(f"log.0.default.{user}", body)).seq

    async def read(self, user: str, **what: Any) -> None:
        _, record = state_record("read", tenant="default", user=user, device="phone", **what)
        await self.broker.append(f"log.0.default.{user}", record)

    async def fold(self, bound: int = 1000) -> None:
        """What a projector does."""
        store = UnreadStore(self.redis, 0, bound=bound)
        newest = await self.broker.leader_last("LOG-0", "log.0.>")
        epoch = (await self.broker.stream("LOG-0")).epoch
        assert newest is not None
        assert epoch is not None
        at = await store.checkpoint()
        async for batch in replay(self.broker, "LOG-0", "log.0.>", at.seq + 1 if at else 1, newest.seq):
            to = Checkpoint(epoch, batch[-1].seq)
            assert await store.apply(batch, at, to)
            at = to
        await store.close()

    async def counts(self, *users: str) -> list[Unread]:
        reader = UnreadReader(self.redis)
        counts = await reader.read(0, [f"default.{user}" for user in users])
        await reader.close()
        return counts.users

    async def verified(self) -> tuple[list[Any], int]:
        work = UnreadVerification(self.broker, self.redis, 1)
        return [one async for one in work.differences()], work.result.not_verifiable


@pytest.fixture
async def house(nats_server, valkey) -> AsyncIterator[House]:
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        yield House(broker, redis)


async def test_who_still_believes_in_a_version_that_is_dropped_sees_no_count_on_its_way_down(
    valkey, monkeypatch
) -> None:
    users = [f"default.user-{n}" for n in range(1500)]
    batch = [
        Delivered(f"log.0.{user}".encode(), seq, 1_800_000_000_000_000_000, b"", b'{"id":"a","kind":"notification"}')
        for seq, user in enumerate(users, 1)
    ]
    at = Checkpoint(EPOCH, len(batch))
    async with Redis.from_url(valkey.url) as redis:
        reader = UnreadReader(redis)
        for version in (1, 2):
            store = UnreadStore(redis, 0, version=version)
            assert await store.apply(batch, None, at)
            await store.close()
        unlink, wrong = redis.unlink, []

        async def unlink_and_look(*keys: Any) -> Any:
            done = await unlink(*keys)
            counts = await reader.read(0, users[:200])
            wrong.extend(one for one in counts.users if one.count != 1)
            return done

        await reader.read(0, [])
        await write_version(redis, 2)
        monkeypatch.setattr(redis, "unlink", unlink_and_look)
        await drop_version(redis, 0, 1)
        assert wrong == []
        assert await redis.keys("unread:{0:1}*") == []
        await reader.close()


async def test_what_is_unread_and_older_than_the_log_is_carried_over(house: House) -> None:
    for id in ("old", "older", "read later"):
        await house.append("alice", id, category="mail")
    await house.append("alice", "superseded later", collapse_key="k")
    await house.append("alice", "expires", expires_at="2126-01-01T00:00:00Z", collapse_key="other")
    last = await house.append("bob", "plain")
    await house.append("carol", "new")
    await house.read("alice", ids=["read later"])
    await house.append("alice", "newer", collapse_key="k")
    await house.fold()
    before = await house.counts("alice", "bob", "carol")
    assert before == [Unread(4, {"mail": 2}), Unread(1, {}), Unread(1, {})]
    assert await house.verified() == ([], 0)
    await house.broker.api("STREAM.PURGE.LOG-0", {"seq": last + 1})
    assert await house.verified() == ([], 2)
    done = await rebuild_unread(house.broker, house.redis, 1)
    assert await house.counts("alice", "bob", "carol") == before
    assert done.carried == 4
    assert await house.verified() == ([], 2)
    await house.append("alice", "newest", collapse_key="other")
    await house.fold()
    assert (await house.counts("alice"))[0] == Unread(4, {"mail": 2}), "what was carried over is still superseded"
    await house.read("alice", up_to=last)
    await house.fold()
    assert (await house.counts("alice"))[0] == Unread(2, {})


async def test_a_rebuild_whose_answer_from_redis_was_lost_does_not_take_its_own_work_for_that_of_another(
    house: House, monkeypatch
) -> None:
    last = await house.append("alice", "old")
    await house.append("alice", "new")
    await house.fold()
    await house.broker.api("STREAM.PURGE.LOG-0", {"seq": last + 1})
    carry = UnreadStore.carry

    async def carry_twice(self: UnreadStore, *args: Any) -> bool:
        await carry(self, *args)  # its answer is lost, and the script is run again
        return await carry(self, *args)

    monkeypatch.setattr(UnreadStore, "carry", carry_twice)
    done = await rebuild_unread(house.broker, house.redis, 1)
    assert done.carried == 1
    assert await house.counts("alice") == [Unread(2, {})]


async def test_what_was_given_up_before_the_log_begins_is_still_said(house: House) -> None:
    for number in range(5):
        last = await house.append("alice", f"e{number}")
    await house.append("bob", "x")
    await house.fold(bound=3)
    assert (await house.counts("alice"))[0] == Unread(3, {}, more=True)
    await house.broker.api("STREAM.PURGE.LOG-0", {"seq": last + 1})
    await rebuild_unread(house.broker, house.redis, 1)
    assert (await house.counts("alice"))[0] == Unread(3, {}, more=True)


async def test_what_a_former_incarnation_of_the_log_left_unread_still_counts_and_is_read_before_all_that_is_newer(
    house: House,
) -> None:
    for id in ("read", "unread", "given up"):
        last = await house.append("alice", id, category="mail")
    await house.read("alice", ids=["read"])
    await house.append("bob", "b1")
    await house.append("bob", "b2")
    await house.fold()
    await house.broker.api("STREAM.DELETE.LOG-0")
    await topology.ensure(house.broker, "dev", 1, overrides=FAST)
    first = await house.append("alice", "newer")
    await house.append("alice", "read")  # published again: it was read in the former log
    assert first < last
    done = await rebuild_unread(house.broker, house.redis, 1)
    assert done.carried == 4
    assert await house.counts("alice", "bob") == [Unread(3, {"mail": 2}), Unread(2, {})]
    await house.read("alice", up_to=0)
    await house.read("bob", ids=["b1"])
    await house.fold()
    assert await house.counts("alice", "bob") == [Unread(3, {"mail": 2}), Unread(1, {})]
    await house.read("alice", up_to=first)
    await house.fold()
    assert await house.counts("alice", "bob") == [Unread(0, {}), Unread(1, {})]


async def test_a_count_of_somebody_whom_the_log_does_not_know_is_a_difference(house: House) -> None:
    await house.append("alice", "a")
    await house.fold()
    await house.redis.zadd("unread:{0:1}:s:default.nobody", {"a": 1})
    [found], _ = await house.verified()
    assert found.key == ["default", "nobody"]


async def test_what_a_rebuild_that_was_killed_after_its_switch_has_left_is_cleared_away_by_the_next(
    house: House, monkeypatch
) -> None:
    await house.append("alice", "a")
    await house.fold()
    unlink = house.redis.unlink

    async def killed(*keys: Any) -> Any:
        if await read_version(house.redis) == 2:
            raise KeyboardInterrupt
        return await unlink(*keys)

    with monkeypatch.context() as patch:
        patch.setattr(house.redis, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            await rebuild_unread(house.broker, house.redis, 1)
    assert await house.redis.keys("unread:{0:1}*") != []
    await rebuild_unread(house.broker, house.redis, 1)
    left = {key.split(b"}")[0] for key in await house.redis.keys("unread:{*")}
    assert left == {b"unread:{0:3"}
    assert (await house.counts("alice"))[0] == Unread(1, {})


async def test_a_rebuild_that_another_one_overtakes_gives_up_and_leaves_its_counts_alone(
    house: House, monkeypatch
) -> None:
    await house.append("alice", "a")
    await house.fold()

    async def while_another_runs(redis: Redis) -> int:
        monkeypatch.setattr(unread_rebuild, "read_version", read_version)
        live = await read_version(redis)
        await rebuild_unread(house.broker, house.redis, 1)
        return live

    monkeypatch.setattr(unread_rebuild, "read_version", while_another_runs)
    with pytest.raises(TopologyError, match="another rebuild"):
        await rebuild_unread(house.broker, house.redis, 1)
    assert await read_version(house.redis) == 2
    assert (await house.counts("alice")) == [Unread(1, {})]
