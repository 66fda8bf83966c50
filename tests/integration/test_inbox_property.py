"""Whatever the records, receipts, batches, restarts and stale projectors: the tables hold what the plain folds give."""

import asyncio
import time
from typing import Any, Final

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.partition.reader import Delivered
from projections.deliveries.table import DeliveriesStore
from projections.inbox.table import InboxStore
from projections.store import Checkpoint
from tests.support.tables import (
    EPOCH,
    TABLES,
    as_stream,
    expected_deliveries,
    expected_inbox,
    receipts,
    records,
    stored_deliveries,
    stored_inbox,
)

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def runner(postgres: str):
    """A runner of scenarios over one database that is emptied between them."""
    with asyncio.Runner() as runner:

        async def start() -> asyncpg.Pool:
            return await asyncpg.create_pool(postgres, min_size=1, max_size=2)

        pool = runner.run(start())
        try:
            yield lambda scenario: runner.run(scenario(pool))
        finally:
            pool.terminate()


def over_months(stream: list[Delivered]) -> list[Delivered]:
    """The same, stored in the last eighty days: some rows go with one month, some with another."""
    step = 80 * 86_400_000_000_000 // max(1, len(stream))
    now = time.time_ns() // 1000 * 1000
    return [
        msgspec.structs.replace(one, time_nanoseconds=now - step * (len(stream) - number))
        for number, one in enumerate(stream)
    ]


MONTHS: Final = {"one month": list, "several months": over_months}


def cuts(total: int, data: st.DataObject) -> list[int]:
    sizes = []
    while total:
        sizes.append(data.draw(st.integers(1, total)))
        total -= sizes[-1]
    return sizes


async def empty(pool: asyncpg.Pool) -> None:
    """Few rows of many months are deleted sooner than a file for each table and index is made anew."""
    for table in TABLES.split(", "):
        await pool.execute(f"DELETE FROM {table}")


async def fold_in(pool: asyncpg.Pool, make: Any, stream: list[Any], sizes: list[int]) -> None:
    at, start = None, 0
    for size in sizes:
        # A projector that has just started, and one that slept since before the last batch.
        store, sleeper = make(pool), make(pool)
        assert await store.checkpoint() == at
        batch = stream[start : start + size]
        to = Checkpoint(EPOCH, batch[-1].seq)
        assert await store.apply(batch, at, to)
        assert not await sleeper.apply(batch, at, to), "a stale projector has changed something"
        assert not await sleeper.apply(batch, Checkpoint("zzzzzzzz", to.seq), to)
        at, start = to, start + size


@pytest.mark.parametrize("stored_in", MONTHS)
@many
@given(drawn=records, data=st.data())
def test_the_inbox_equals_the_fold_of_the_log(runner, drawn: Any, data: st.DataObject, stored_in: str) -> None:
    log = MONTHS[stored_in](as_stream(drawn))
    sizes = cuts(len(log), data)

    async def scenario(pool: asyncpg.Pool) -> None:
        await empty(pool)
        await fold_in(pool, lambda pool: InboxStore(pool, 0), log, sizes)
        assert await stored_inbox(pool) == expected_inbox(log)

    runner(scenario)


@pytest.mark.parametrize("stored_in", MONTHS)
@many
@given(drawn=receipts, data=st.data())
def test_deliveries_equal_the_fold_of_the_receipts(runner, drawn: Any, data: st.DataObject, stored_in: str) -> None:
    stream = MONTHS[stored_in](as_stream(drawn, "rcpt.0."))
    sizes = cuts(len(stream), data)

    async def scenario(pool: asyncpg.Pool) -> None:
        await empty(pool)
        await fold_in(pool, lambda pool: DeliveriesStore(pool, 0), stream, sizes)
        assert await stored_deliveries(pool) == expected_deliveries(stream)

    runner(scenario)


@many
@given(drawn=receipts, data=st.data())
def test_receipts_give_the_same_deliveries_in_any_order_and_told_twice(runner, drawn: Any, data: st.DataObject) -> None:
    once = as_stream(drawn, "rcpt.0.")
    again = as_stream(data.draw(st.permutations(drawn + drawn[: len(drawn) // 2])), "rcpt.0.")
    one, other = expected_deliveries(once), expected_deliveries(again)
    assert one["deliveries"] == other["deliveries"]
    assert {r[:8] for r in one["ranges"]} == {r[:8] for r in other["ranges"]}
