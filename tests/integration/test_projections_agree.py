"""The count and the list are two folds of one log, written apart: whatever the log holds, they say the same of every user."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from engine.partition.reader import Delivered
from projections.folds import inbox as inbox_fold
from projections.folds import unread as unread_fold
from projections.folds.unread import Unread
from projections.inbox import queries as inbox_queries
from projections.inbox.table import InboxStore
from projections.store import Checkpoint
from projections.unread.carry import carried, carry_given_up
from projections.unread.reader import UnreadReader
from projections.unread.store import FIRST_VERSION, UnreadStore, write_version
from tests.integration.test_inbox_property import cuts
from tests.support.tables import EPOCH, START, TABLES, USERS, as_stream, marks, notifications, others

BOUND, REMEMBERED = 4, 3
LATEST = START + 100

# What only the inbox reads is not as it should be: the count must not take for a record what the list takes for none.
odd = st.sampled_from(
    [
        {"id": "e1", "kind": "notification", "at": "yesterday"},
        {"id": "e2", "kind": "notification", "type": 7, "plan": []},
        {"id": "e3", "kind": "read", "ids": ["e1"], "device": {}},
        {"id": "e4", "kind": "notification", "event": {"epoch": "e"}},
        {"id": "x" * 129, "kind": "notification"},
        {"id": "e5", "kind": "notification", "collapse_key": "k" * 129},
        {"id": "nul\0", "kind": "notification"},
        {"id": "nul�", "kind": "notification", "category": "nul\0"},
    ]
)
soon = st.integers(-5, 40).map(lambda after: {"expires_at": datetime.fromtimestamp(START + after, UTC).isoformat()})
expiring = st.builds(lambda body, expiry: {**body, **expiry}, notifications, soon)
bodies = st.one_of(notifications, notifications, expiring, marks, odd, others)
logs = st.lists(st.tuples(st.sampled_from([USERS[0], *USERS]), st.integers(1, 3), bodies), max_size=40)

new = {"id": "e1", "kind": "notification"}
read = {"id": "r", "kind": "read", "ids": ["e1"]}
READ_THEN_PUBLISHED_AGAIN = [(USERS[0], 1, new), (USERS[0], 1, read), (USERS[0], 1, new)]

many = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def listed(log: Sequence[Delivered], now: int) -> dict[str, Counter[str]]:
    """By user as tokens: the categories of what the inbox lists as unread at the Unix time `now`."""
    at = datetime.fromtimestamp(now, UTC)
    users = inbox_fold.fold(inbox_fold.decoded(log), EPOCH, remembered=REMEMBERED)
    rows = [row for changes in users.values() for row in changes.rows.values()]
    shown = [
        row
        for row in rows
        if row.shown
        and row.read_seq is row.archived_seq is row.recalled_seq is row.superseded_seq is None
        and (row.expires_at is None or row.expires_at > at)
    ]
    return by_user((row.tenant, row.user_id, row.category) for row in shown)


def by_user(rows: Any) -> dict[str, Counter[str]]:
    found = {user: Counter[str]() for user in USERS}
    for tenant, user, category in rows:
        found[f"{tenant}.{user.replace('@', '=40').replace('.', '=2E')}"][category or ""] += 1
    return found


def assert_agree(counts: dict[str, Unread], lists: dict[str, Counter[str]]) -> None:
    for user, rows in lists.items():
        unread = counts.get(user, Unread(0, {}))
        if unread.more:
            assert unread.count <= rows.total()
        else:
            assert unread == Unread(rows.total(), {name: n for name, n in rows.items() if name})


def counted(log: Sequence[Delivered], now: int) -> dict[str, Unread]:
    return unread_fold.fold(log, now * 1000, bound=BOUND, remembered=REMEMBERED)


@settings(max_examples=300)
@example(drawn=READ_THEN_PUBLISHED_AGAIN, later=0)
@given(drawn=logs, later=st.integers(0, 60))
def test_the_count_and_the_list_of_the_same_log_agree_at_any_moment_from_its_end_on(drawn: Any, later: int) -> None:
    log = as_stream(drawn)
    now = START + len(log) + later
    assert_agree(counted(log, now), listed(log, now))


@pytest.fixture
def runner(pool: asyncpg.Pool, valkey, postgres):
    """Runs a scenario over stores that are empty when it begins."""
    with asyncio.Runner() as runner:

        async def start() -> tuple[asyncpg.Pool, Redis]:
            return await asyncpg.create_pool(postgres, min_size=1, max_size=2), Redis.from_url(valkey.url)

        tables, redis = runner.run(start())

        async def emptied(scenario: Any) -> None:
            await tables.execute(f"TRUNCATE {TABLES}")
            await redis.flushall()
            await scenario(tables, redis)

        try:
            yield lambda scenario: runner.run(emptied(scenario))
        finally:
            tables.terminate()
            runner.run(redis.aclose())


async def fold_in(store: Any, log: Sequence[Delivered], sizes: Sequence[int], at: Checkpoint | None = None) -> None:
    start = 0
    for size in sizes:
        batch = log[start : start + size]
        to = Checkpoint(EPOCH, batch[-1].seq)
        assert await store.apply(batch, at, to)
        at, start = to, start + size


async def stored_list(tables: asyncpg.Pool, now: int) -> dict[str, Counter[str]]:
    shown = inbox_queries.SHOWN_AT.format(now="$1::timestamptz")
    rows = await tables.fetch(
        f"SELECT tenant, user_id, category FROM inbox WHERE {shown} AND {inbox_queries.UNREAD}",
        datetime.fromtimestamp(now, UTC),
    )
    return by_user(tuple(row) for row in rows)


async def stored_counts(redis: Redis, now: int) -> dict[str, Unread]:
    reader = UnreadReader(redis)
    counts = await reader.read(0, USERS, now)
    await reader.close()
    return dict(zip(USERS, counts.users, strict=False))


@many
@example(drawn=READ_THEN_PUBLISHED_AGAIN, later=0, data=None)
@given(drawn=logs, later=st.integers(0, 60), data=st.data())
def test_the_stores_agree_however_the_log_was_cut_into_batches(
    runner, drawn: Any, later: int, data: st.DataObject | None
) -> None:
    log = as_stream(drawn)
    sizes = [(cuts(len(log), data) if data else [1] * len(log)) for _ in range(2)]

    async def scenario(tables: asyncpg.Pool, redis: Redis) -> None:
        counts = UnreadStore(redis, 0, bound=BOUND, remembered=REMEMBERED)
        await fold_in(counts, log, sizes[0])
        await counts.close()
        await fold_in(InboxStore(tables, 0, remembered=REMEMBERED), log, sizes[1])
        now = START + len(log) + later
        assert await stored_counts(redis, now) == {user: counted(log, now).get(user, Unread(0, {})) for user in USERS}
        assert await stored_list(tables, now) == listed(log, now)

    if log:
        runner(scenario)


@many
@given(drawn=logs, later=st.integers(0, 60), data=st.data())
def test_counts_rebuilt_from_a_log_that_has_lost_its_beginning_agree_with_the_list(
    runner, drawn: Any, later: int, data: st.DataObject
) -> None:
    log = as_stream(drawn)
    trimmed = data.draw(st.integers(0, len(log)))
    more = data.draw(st.integers(0, len(log) - trimmed))  # comes when the rebuild is over
    sizes = [cuts(length, data) for length in (len(log) - more, len(log) - more - trimmed, more, len(log))]

    async def scenario(tables: asyncpg.Pool, redis: Redis) -> None:
        live = UnreadStore(redis, 0, bound=BOUND, remembered=10)
        rebuilt = UnreadStore(redis, 0, version=FIRST_VERSION + 1, bound=BOUND, remembered=10)
        until = len(log) - more
        await fold_in(live, log[:until], sizes[0])
        oldest = log[trimmed].seq if trimmed < len(log) else log[-1].seq + 1
        begin = Checkpoint(EPOCH, oldest - 1)
        assert await rebuilt.carry({}, None, begin)
        async for users, _ in carried(redis, 0, FIRST_VERSION, oldest):
            assert await rebuilt.carry(users, begin, begin)
        await carry_given_up(redis, 0, FIRST_VERSION, FIRST_VERSION + 1)
        await fold_in(rebuilt, log[trimmed:until], sizes[1], begin)
        await write_version(redis, FIRST_VERSION + 1)
        await fold_in(rebuilt, log[until:], sizes[2], rebuilt.reached)
        for store in (live, rebuilt):
            await store.close()
        await fold_in(InboxStore(tables, 0, remembered=10), log, sizes[3])
        now = max(LATEST, START + len(log)) + later
        assert_agree(await stored_counts(redis, now), await stored_list(tables, now))

    if log:
        runner(scenario)
