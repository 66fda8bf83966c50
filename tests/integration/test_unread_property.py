"""Whatever the order of records, batches, restarts and stale projectors: Redis holds what the plain fold gives."""

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from redis.asyncio import Redis

from engine.partition.reader import Delivered
from ops.dev.servers import Valkey
from projections.folds.unread import Unread, fold
from projections.store import Checkpoint
from projections.unread import store as unread
from projections.unread.reader import UnreadReader
from projections.unread.store import FIRST_VERSION, Applied, UnreadStore, drop_version, write_version

BOUND = 3
USERS = ["default.alice", "default.bob", "other.alice=40example=2Ecom"]
EPOCH = "abcdefgh"
START = 1_800_000_000  # Unix time of the first record; one second between records

ids = st.sampled_from([f"e{n}" for n in range(12)])
categories = st.sampled_from([None, "", "mail", "ünïcode", "i" * 128])
kept = st.one_of(st.none(), st.integers(-5, 60).map(lambda after: START + after))
notifications = st.fixed_dictionaries(
    {"id": ids, "kind": st.just("notification")},
    optional={
        "category": categories,
        "collapse_key": st.sampled_from([None, "", "k1", "k2"]),
        "expires_at": kept.map(lambda at: at and datetime.fromtimestamp(at, UTC).isoformat()),
        "skip": st.booleans(),
    },
)
removals = st.fixed_dictionaries(
    {"id": ids, "kind": st.sampled_from(["read", "archive", "recall"])},
    optional={"ids": st.lists(ids, max_size=4), "up_to": st.one_of(st.none(), st.integers(-1, 80), st.just(1 << 60))},
)
others = st.sampled_from([{"id": "x", "kind": "other"}, {"kind": "notification"}, {"id": 7, "kind": "notification"}, 3])
records = st.lists(
    st.tuples(
        st.sampled_from([USERS[0], USERS[0], *USERS]),
        st.integers(1, 3),
        st.one_of(notifications, notifications, notifications, removals, others),
    ),
    min_size=12,  # enough to come above the bound, and to take back
    max_size=50,
)


def as_log(drawn: Iterable[tuple[str, int, Any]]) -> list[Delivered]:
    log, seq = [], 0
    for number, (user, step, record) in enumerate(drawn):
        seq += step  # marks of dispatchers lie between
        body = dict(record) if isinstance(record, dict) else record
        skip = isinstance(body, dict) and body.pop("skip", False)
        lines = b"NATS/1.0\r\ntraceparent: 00-00-00-00\r\n%b\r\n" % (b"Seamark-Skip: 1\r\n" if skip else b"")
        at = (START + number) * 1_000_000_000
        log.append(Delivered(b"log.0." + user.encode(), seq, at, lines, json.dumps(body).encode()))
    return log


def expected(log: Sequence[Delivered], now: float, bound: int = BOUND) -> dict[str, Unread]:
    return fold(log, round(now * 1000), bound=bound)


async def shown(redis: Redis, now: float) -> dict[str, Unread]:
    reader = UnreadReader(redis)
    counts = await reader.read(0, USERS, now)
    await reader.close()
    found = dict(zip(USERS, counts.users, strict=False))
    return {user: one for user, one in found.items() if one != Unread(0, {})}


async def apply_in(store: UnreadStore, log: Sequence[Delivered], at: Checkpoint | None, sizes: Iterable[int]) -> Any:
    start = 0
    for size in sizes:
        batch = log[start : start + size]
        if batch:
            to = Checkpoint(EPOCH, batch[-1].seq)
            assert await store.apply(batch, at, to)
            start, at = start + len(batch), to
    return at


def sizes_of(total: int, data: st.DataObject) -> list[int]:
    sizes = []
    while total:
        sizes.append(data.draw(st.integers(1, total)))
        total -= sizes[-1]
    return sizes


@pytest.fixture
def runner(valkey: Valkey):
    with asyncio.Runner() as runner:
        redis = Redis.from_url(valkey.url)
        yield lambda scenario: runner.run(scenario(redis))
        runner.run(redis.aclose())


pytestmark = pytest.mark.timeout(300)  # a few hundred small logs, written and folded again and again

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(drawn=records, data=st.data(), now=st.integers(-2, 70))
def test_counts_equal_the_fold_of_the_log_at_any_moment(runner, drawn, data: st.DataObject, now: int) -> None:
    log = as_log(drawn)

    async def scenario(redis: Redis) -> None:
        await redis.flushall()
        at, start = None, 0
        for size in sizes_of(len(log), data):
            # A projector that has just started, and one that slept since before the last batch.
            store, sleeper = UnreadStore(redis, 0, bound=BOUND), UnreadStore(redis, 0, bound=BOUND)
            assert await store.checkpoint() == at
            batch = log[start : start + size]
            to = Checkpoint(EPOCH, batch[-1].seq)
            assert await store.apply(batch, at, to)
            assert not await sleeper.apply(batch, at, to), "a stale projector has changed something"
            assert not await sleeper.apply(batch, Checkpoint("zzzzzzzz", to.seq), to)
            at, start = to, start + size
            await store.close()
            await sleeper.close()
            assert await shown(redis, START + now) == expected(log[:start], START + now)

    runner(scenario)


@many
@given(drawn=records, data=st.data(), now=st.integers(-2, 70))
def test_a_rebuild_and_an_old_snapshot_with_the_tail_give_what_the_incremental_fold_gave(
    runner, drawn, data: st.DataObject, now: int
) -> None:
    log = as_log(drawn)

    async def scenario(redis: Redis) -> None:
        await redis.flushall()
        live = UnreadStore(redis, 0, bound=BOUND)
        rebuilt = UnreadStore(redis, 0, version=FIRST_VERSION + 1, bound=BOUND)
        try:
            await compare(redis, live, rebuilt)
        finally:
            await live.close()
            await rebuilt.close()

    async def compare(redis: Redis, live: UnreadStore, rebuilt: UnreadStore) -> None:
        cut = data.draw(st.integers(0, len(log)))
        at = await apply_in(live, log[:cut], None, sizes_of(cut, data))
        snapshot = {key: await redis.dump(key) for key in await redis.keys("*")}
        await apply_in(live, log[cut:], at, sizes_of(len(log) - cut, data))
        incremental = await contents(redis)

        await redis.flushall()
        for key, value in snapshot.items():
            await redis.restore(key, 0, value)
        await apply_in(live, log[cut:], at, sizes_of(len(log) - cut, data))
        assert await contents(redis) == incremental

        await apply_in(rebuilt, log, None, sizes_of(len(log), data))
        await write_version(redis, FIRST_VERSION + 1)
        await drop_version(redis, 0, FIRST_VERSION)
        assert await shown(redis, START + now) == expected(log, START + now)
        assert await contents(redis) == {
            key.replace(b"{0:1}", b"{0:2}"): value for key, value in incremental.items()
        }  # to the last key: nothing is left behind, nothing is missing

    runner(scenario)


async def contents(redis: Redis) -> dict[bytes, Any]:
    """Everything that is stored, but clock and version."""
    found: dict[bytes, Any] = {}
    for key in await redis.keys("unread:{*"):
        kind = await redis.type(key)
        if key.endswith(b":due"):
            continue  # who to look after next; users are taken out of it when looked at, not when they read
        found[key] = await (redis.hgetall(key) if kind == b"hash" else redis.zrange(key, 0, -1, withscores=True))
        if key.endswith(b":meta"):
            found[key].pop(b"fresh")
    return found


async def test_a_batch_too_heavy_for_one_script_is_applied_in_several(valkey: Valkey, monkeypatch) -> None:
    monkeypatch.setattr(unread, "WEIGHT_MAX", 10)
    log = as_log([(USERS[n % 3], 1, {"id": f"e{n}", "kind": "notification", "category": "mail"}) for n in range(95)])
    told: list[Applied] = []
    async with Redis.from_url(valkey.url) as redis:
        store = UnreadStore(redis, 0, applied=told.append)
        assert await store.apply(log, None, Checkpoint(EPOCH, log[-1].seq))
        assert [one.seq for one in told] == [*range(10, 95, 10), 95]
        assert await store.checkpoint() == Checkpoint(EPOCH, 95)
        assert await shown(redis, START) == expected(log, START, bound=1000)
        # In the middle of it another projector was quicker: what it has not done is not done.
        await redis.hset("unread:{0:1}:meta", "checkpoint", f"{EPOCH}.1")
        assert not await store.apply(log, Checkpoint(EPOCH, 95), Checkpoint(EPOCH, 95))
        await store.close()


async def test_what_expires_is_said_once_and_what_is_left_stays(valkey: Valkey) -> None:
    at = lambda after: datetime.fromtimestamp(START + after, UTC).isoformat()  # noqa: E731
    log = as_log(
        [
            (USERS[0], 1, {"id": "a", "kind": "notification", "expires_at": at(10), "category": "mail"}),
            (USERS[0], 1, {"id": "b", "kind": "notification", "expires_at": at(20), "category": "mail"}),
            (USERS[1], 1, {"id": "c", "kind": "notification"}),
        ]
    )
    async with Redis.from_url(valkey.url) as redis:
        store = UnreadStore(redis, 0)
        checkpoint = Checkpoint(EPOCH, 3)
        assert await store.apply(log, None, checkpoint)

        async def due(after: float) -> Any:
            return await store.attend(checkpoint, complete=True, age_seconds=0.0, now=START + after)

        assert await due(9) == []
        assert await due(11) == [(USERS[0], Unread(1, {"mail": 1}))]
        assert await due(12) == []
        assert await due(30) == [(USERS[0], Unread(0, {}))]
        assert await due(31) == []
        assert await store.attend(Checkpoint(EPOCH, 2), complete=True, age_seconds=0.0, now=START) is None
        await store.close()


async def test_a_count_is_stale_unless_somebody_has_lately_seen_that_nothing_is_missing(valkey: Valkey) -> None:
    async with Redis.from_url(valkey.url) as redis:
        store, reader = UnreadStore(redis, 0), UnreadReader(redis)
        checkpoint = Checkpoint(EPOCH, 3)
        assert (await reader.read(0, USERS))[:3] == (None, True, [])
        [one] = as_log([(USERS[0], 3, {"id": "a", "kind": "notification"})])
        assert await store.apply([replace(one, time_nanoseconds=time.time_ns())], None, checkpoint)
        assert not (await reader.read(0, USERS)).stale, "its newest record was stored just now"
        for age, stale in ((0.5, False), (60.0, True), (1.0, False)):
            await store.attend(checkpoint, complete=False, age_seconds=age, now=START)
            assert (await reader.read(0, USERS)).stale is stale
        # A fold that begins from nothing: fresh records, but not yet all of those that were shown before.
        store.until = 9
        later = as_log([(USERS[0], 8, {"id": "b", "kind": "notification"})])
        assert await store.apply(later, checkpoint, Checkpoint(EPOCH, 8))
        assert (await reader.read(0, USERS)).stale
        await store.attend(Checkpoint(EPOCH, 8), complete=True, age_seconds=0.0, now=START)
        assert not (await reader.read(0, USERS)).stale
        await store.close()
        await reader.close()
