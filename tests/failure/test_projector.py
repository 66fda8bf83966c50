"""Projectors that die, and a Redis that forgets: every count shown as fresh is the fold of the log up to where it says."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker, Outgoing
from engine.errors import StoreUnavailable
from engine.partition.reader import Delivered
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections.folds.unread import Unread, UserFold, fold
from projections.unread.reader import UnreadReader
from seamark.protocol.records import state_record
from seamark.protocol.subjects import encode_token, log_subject, partition_of
from tests.support.logs import FAST, at_work, connected, eventually
from tests.support.projections import PARTITIONS, log_of, projecting, projector_processes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

TENANT = "default"
USERS = [f"user-{n}" for n in range(40)]


def partition(user: str) -> int:
    return partition_of(TENANT, encode_token(user), PARTITIONS)


class Writer:
    """Appends notifications, and a read now and then, in atomic batches as a dispatcher would."""

    def __init__(self, broker: Broker, rng: random.Random) -> None:
        self._broker = broker
        self._rng = rng
        self.written = 0

    async def write(self, count: int) -> None:
        """In rounds that fit an atomic batch, wherever their users are."""
        for start in range(0, count, 900):
            await self._round(min(900, count - start))

    async def _round(self, count: int) -> None:
        batches: dict[int, list[Outgoing]] = {}
        for _ in range(count):
            user = self._rng.choice(USERS)
            p = partition(user)
            self.written += 1
            batches.setdefault(p, []).append(Outgoing(log_subject(p, TENANT, user), self._record(user)))
        for messages in batches.values():
            await self._broker.commit(messages, timeout_seconds=30)

    def _record(self, user: str) -> bytes:
        n = self.written
        if self._rng.random() < 0.1:
            earlier = [f"e{self._rng.randint(1, n)}" for _ in range(20)]
            return state_record("read", tenant=TENANT, user=user, device="d", ids=earlier, record_id=f"e{n}")[1]
        if self._rng.random() < 0.02:
            return state_record("read", tenant=TENANT, user=user, device="d", up_to=n, record_id=f"e{n}")[1]
        category = self._rng.choice([b'"mail"', b'"shop"', b"null"])
        return b'{"id":"e%d","kind":"notification","category":%b,"data":{}}' % (n, category)


class Seen(NamedTuple):
    """A count that was shown as fresh."""

    partition: int
    user: str
    seq: int
    unread: Unread


class Observer:
    """Reads counts without a pause, as gateways do, and remembers what was not called stale."""

    def __init__(self, redis: Redis) -> None:
        self._reader = UnreadReader(redis)
        self.seen: set[tuple[int, str, int, int, bool, tuple[tuple[str, int], ...]]] = set()
        self.stale = 0
        self.nothing = 0

    async def run(self) -> None:
        while True:
            for p in range(PARTITIONS):
                users = [f"{TENANT}.{user}" for user in USERS if partition(user) == p]
                try:
                    counts = await self._reader.read(p, users)
                except StoreUnavailable:
                    continue
                if counts.checkpoint is None:
                    self.nothing += 1
                elif counts.stale:
                    self.stale += 1
                else:
                    for user, one in zip(users, counts.users, strict=True):
                        shown = (one.count, one.more, tuple(sorted(one.by_category.items())))
                        self.seen.add((p, user, counts.checkpoint.seq, *shown))
            await asyncio.sleep(0.01)

    @property
    def unsure(self) -> int:
        """How often the count of a partition was called stale, or there was none."""
        return self.stale + self.nothing

    async def close(self) -> None:
        await self._reader.close()

    def wrong(self, logs: dict[int, list[Delivered]]) -> list[str]:
        """What was shown as fresh and is not the fold of the log up to the position it named."""
        found = []
        for p, log in logs.items():
            folds: dict[str, UserFold] = {}
            waiting = sorted(one for one in self.seen if one[0] == p)
            waiting.sort(key=lambda one: one[2])
            at = 0
            for _, user, seq, count, more, categories in waiting:
                while at < len(log) and log[at].seq <= seq:
                    record = log[at]
                    folds.setdefault(record.subject.decode().split(".", 2)[2], UserFold()).apply(record)
                    at += 1
                true = folds[user].count(0) if user in folds else Unread(0, {})
                if (count, more, dict(categories)) != (true.count, true.more, true.by_category):
                    found.append(f"{user} as of {seq}: shown {count} {more} {categories}, is {true}")
        return found


@asynccontextmanager
async def observing(redis: Redis) -> AsyncIterator[Observer]:
    observer = Observer(redis)
    try:
        async with at_work(observer.run(), "observer"):
            yield observer
    finally:
        await observer.close()


async def emptied(redis: Redis, observer: Observer) -> None:
    """Take everything from it; returns once that was seen, and not shown as fresh."""
    before = observer.unsure
    await redis.flushall()
    await eventually(lambda: observer.unsure > before, every_seconds=0.002)


async def everything(redis: Redis) -> dict[str, Unread]:
    """Every count that is not nothing; empty while one is stale, or Redis does not answer."""
    reader, found = UnreadReader(redis), {}
    try:
        for p in range(PARTITIONS):
            users = [f"{TENANT}.{user}" for user in USERS if partition(user) == p]
            try:
                counts = await reader.read(p, users)
            except StoreUnavailable:
                return {}
            if counts.checkpoint is None or counts.stale:
                return {}
            found |= {user: one for user, one in zip(users, counts.users, strict=True) if one != Unread(0, {})}
    finally:
        await reader.close()
    return found


async def whole_log(broker: Broker) -> dict[int, list[Delivered]]:
    return {p: await log_of(broker, p) for p in range(PARTITIONS)}


def folded(logs: dict[int, list[Delivered]]) -> dict[str, Unread]:
    return fold([record for log in logs.values() for record in log], round(time.time() * 1000))


async def test_redis_emptied_at_2000_records_a_second_is_stale_then_rebuilt_and_never_wrong(
    nats_server: NatsServer, valkey: Valkey, rng: random.Random
) -> None:
    async with (
        connected(nats_server.url) as broker,
        Redis.from_url(valkey.url, socket_timeout=None) as redis,
        AsyncExitStack() as stack,
    ):
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        async with projecting(nats_server.url, valkey.url):
            observer = await stack.enter_async_context(observing(redis))
            writer = Writer(broker, rng)
            began = time.monotonic()
            for tenth in range(70):
                if tenth in (20, 35, 50):
                    await emptied(redis, observer)
                await writer.write(200)
                await asyncio.sleep(max(0.0, began + (tenth + 1) * 0.1 - time.monotonic()))
            rate = writer.written / (time.monotonic() - began)
            logs = await whole_log(broker)
            expected = folded(logs)

            async def equal() -> bool:
                return await everything(redis) == expected

            await eventually(equal, seconds=60, every_seconds=0.2)
            # And where nothing arrives any more.
            fresh = len(observer.seen)
            await emptied(redis, observer)
            await eventually(equal, seconds=60, every_seconds=0.2)
    wrong = observer.wrong(logs)
    assert not wrong, wrong[:3]
    assert fresh > 100, "nothing was ever shown as fresh"
    print(
        f"{rate:.0f} records/s, {len(observer.seen)} counts seen fresh, {observer.stale} stale, {observer.nothing} none"
    )


@pytest.mark.chaos(takes_seconds=120)
@pytest.mark.timeout(600)
async def test_twenty_kills_of_the_active_projector_in_100000_records_count_nothing_twice_and_lose_nothing(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, rng: random.Random
) -> None:
    total, kills = 100_000, 20
    async with (
        connected(nats_server.url) as broker,
        Redis.from_url(valkey.url, socket_timeout=None) as redis,
        AsyncExitStack() as stack,
    ):
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        with projector_processes(tmp_path, nats_server.url, valkey.url) as processes:
            for process in processes:
                process.start()
            observer, writer = await stack.enter_async_context(observing(redis)), Writer(broker, rng)
            take_overs: list[float] = []
            await writer.write(1000)
            for number in range(kills):
                await eventually(lambda: nudged(writer, lambda: active(processes)), seconds=60, every_seconds=0.1)
                victim = max(processes, key=owned)
                writing = asyncio.create_task(writer.write((total - writer.written) // (kills - number)), name="write")
                await asyncio.sleep(rng.random() * 0.3)
                victim.kill()
                killed_at = time.monotonic()
                survivor = next(process for process in processes if process is not victim)
                alone = partial(owns_all, survivor)
                await eventually(
                    lambda alone=alone, writing=writing: nudged(writer, alone, writing), seconds=60, every_seconds=0.1
                )
                take_overs.append(time.monotonic() - killed_at)
                await writing
                victim.start()
            logs = await whole_log(broker)
            expected = folded(logs)

            async def equal() -> bool:
                return await everything(redis) == expected

            await eventually(equal, seconds=120, every_seconds=0.2)
    assert sum(len(log) for log in logs.values()) == writer.written >= total
    wrong = observer.wrong(logs)
    assert not wrong, wrong[:3]
    assert len(observer.seen) > 100, "nothing was ever shown as fresh"
    # On a machine that stalls, some take longer.
    assert statistics.median(take_overs) < 10.0, f"take-overs took {take_overs} s"
    print(
        f"{writer.written} records, {kills} kills, slowest take-over {max(take_overs):.1f} s,"
        f" {len(observer.seen)} counts seen"
    )


def owned(process) -> float:
    return process.metric("seamark_partition_owned") if process.alive else 0.0


def owns_all(process) -> bool:
    return owned(process) == PARTITIONS


async def nudged(writer, check, writing=None) -> bool:
    """`check`, with something to read in every log while it does not hold: a partition without news has no owner."""
    if check():
        return True
    if writing is None or writing.done():
        await writer.write(20)
    return False


def active(processes) -> bool:
    return sum(owned(process) for process in processes) >= PARTITIONS
