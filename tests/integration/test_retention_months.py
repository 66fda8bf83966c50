"""Tables divided by months: what is one row stays one, whatever months it is told of in, and which time a batch is kept by."""

import asyncio
import functools
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from engine.errors import StoreUnavailable
from engine.partition.reader import Delivered
from engine.postgres import asking
from projections.deliveries.table import RANGES_IN_ALL_MONTHS_MAX, DeliveriesStore
from projections.folds.deliveries import DEVICES_MAX
from projections.inbox.table import InboxStore
from projections.postgres.versions import filled_leaves
from projections.retention import rules
from projections.retention.months import month_of
from projections.retention.rules import EVERY_TENANT, Retention, RetentionTable
from projections.store import Checkpoint
from tests.support.logs import eventually
from tests.support.network import bad_network
from tests.support.tables import EPOCH, stored, stored_deliveries, stored_inbox

AT = "2026-01-31T12:00:00Z"


async def test_the_first_batch_after_a_retention_was_set_is_kept_by_it(pool: asyncpg.Pool) -> None:
    store = InboxStore(pool, 0)
    assert await store.apply([stored(1, 0, {"id": "a", "kind": "notification"})], None, Checkpoint(EPOCH, 1))
    await RetentionTable(pool).set(EVERY_TENANT, 200)
    to = Checkpoint(EPOCH, 2)
    assert await store.apply([stored(2, 0, {"id": "b", "kind": "notification"})], Checkpoint(EPOCH, 1), to)
    days = await pool.fetch("SELECT kept_until - stored_at AS kept FROM inbox ORDER BY seq")
    assert [round(row["kept"] / timedelta(days=1)) for row in days] == [90, 200]


async def test_who_sets_a_retention_waits_for_a_batch_under_the_former_one_so_that_newer_rows_leave_no_sooner(
    pool: asyncpg.Pool, postgres: str, monkeypatch
) -> None:
    read, go_on, retention = asyncio.Event(), asyncio.Event(), InboxStore._retention

    async def slowly(*args: Any) -> Retention:
        found = await retention(*args)
        read.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(InboxStore, "_retention", slowly)
    # It waits for as long as this test looks, however busy the machine is.
    monkeypatch.setattr(rules, "_BEGIN", rules._BEGIN.replace("lock_timeout = '4s'", "lock_timeout = '60s'"))
    monkeypatch.setattr(rules, "asking", functools.partial(asking, seconds=60.0))
    batch = [stored(1, 0, {"id": "a", "kind": "notification"})]
    folding = asyncio.create_task(InboxStore(pool, 0).apply(batch, None, Checkpoint(EPOCH, 1)))
    await read.wait()
    setting = asyncio.create_task(RetentionTable(pool).set(EVERY_TENANT, 30))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncpg.create_pool(postgres, min_size=1, max_size=1) as others:  # both connections of `pool` are in use
        await eventually(lambda: others.fetchval(waiting))
    go_on.set()
    assert await folding
    kept = await setting
    assert kept.not_before is not None
    assert await pool.fetchval("SELECT kept_until FROM inbox") <= kept.not_before


async def test_no_batch_waits_behind_a_client_that_was_lost_while_it_set_a_retention(
    pool: asyncpg.Pool, postgres: str
) -> None:
    begun, port = "BEGIN; LOCK TABLE retention IN ROW SHARE MODE", urlsplit(postgres).port or 0
    async with bad_network(port) as network, pool.acquire() as slow_batch, pool.acquire() as next_batch:
        await slow_batch.execute(begun)
        far = await asyncpg.create_pool(postgres.replace(f":{port}/", f":{network.port}/"), min_size=1, max_size=1)
        setting = asyncio.create_task(RetentionTable(far).set(EVERY_TENANT, 30), name="setting")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        await eventually(lambda: next_batch.fetchval(waiting))
        network.blackhole()
        with pytest.raises(StoreUnavailable):
            async with asyncio.timeout(20):
                await setting
        far.terminate()
        # `slow_batch` goes on: whoever still waited for it would be waited for, too, for however long.
        await next_batch.execute("SET lock_timeout = '10s'")
        await next_batch.execute(f"{begun}; ROLLBACK")
        await slow_batch.execute("ROLLBACK")


async def test_an_id_published_again_in_another_month_is_one_row(pool: asyncpg.Pool) -> None:
    store = InboxStore(pool, 0)
    again = {"id": "e1", "kind": "notification"}
    assert await store.apply([stored(1, 80, again)], None, Checkpoint(EPOCH, 1))
    assert await store.apply([stored(2, 40, again)], Checkpoint(EPOCH, 1), Checkpoint(EPOCH, 2))
    read = {"id": "r", "kind": "read", "ids": ["e1"]}
    assert await store.apply([stored(3, 0, again), stored(4, 0, read)], Checkpoint(EPOCH, 2), Checkpoint(EPOCH, 4))
    assert [(row["seq"], row["read_seq"]) for row in await stored_inbox(pool)] == [(1, 4)]


async def test_what_receipts_say_in_several_months_is_one_row_that_goes_with_the_last(pool: asyncpg.Pool) -> None:
    store = DeliveriesStore(pool, 0)
    mail = {"id": "e1", "channel": "email"}
    ack = {
        "channel": "inapp",
        "device": "tv",
        "state": "acknowledged",
        "epoch": EPOCH,
        "after": 0,
        "up_to": 3,
        "at": AT,
    }
    first = [stored(1, 80, {**mail, "state": "sent", "at": AT}, b"rcpt"), stored(2, 80, ack, b"rcpt")]
    last = [stored(3, 1, {**mail, "state": "read", "at": AT}, b"rcpt"), stored(4, 1, ack, b"rcpt")]
    assert await store.apply(first, None, Checkpoint(EPOCH, 2))
    assert await store.apply(last, Checkpoint(EPOCH, 2), Checkpoint(EPOCH, 4))
    found = await stored_deliveries(pool)
    assert [one["state"] for one in found["deliveries"].values()] == ["read"]
    assert len(found["ranges"]) == await pool.fetchval("SELECT count(*) FROM delivery_ranges") == 1
    assert await pool.fetchval("SELECT kept_until > now() + interval '80 days' FROM deliveries")


MANY = RANGES_IN_ALL_MONTHS_MAX + 1
"""Ranges of a batch for which only the months that hold rows are looked into."""


def many_ranges(first: int, days_ago: float) -> list[Delivered]:
    """Receipts about the same ranges each time, stored from `first` on."""
    ack = {"channel": "inapp", "device": "tv", "state": "acknowledged", "epoch": EPOCH, "at": AT}
    bounds = [{"after": number, "up_to": number + 1} for number in range(MANY)]
    return [stored(first + number, days_ago, {**ack, **one}, b"rcpt") for number, one in enumerate(bounds)]


async def test_ranges_told_again_in_another_month_by_a_large_batch_are_in_the_table_once(pool: asyncpg.Pool) -> None:
    store, expected = DeliveriesStore(pool, 0), None
    for days_ago in (80, 40, 40, 1):
        first = expected.seq + 1 if expected is not None else 1
        reached = Checkpoint(EPOCH, first + MANY - 1)
        assert await store.apply(many_ranges(first, days_ago), expected, reached)
        assert await pool.fetchval("SELECT count(*) FROM delivery_ranges") == MANY
        expected = reached


async def test_ranges_told_again_while_their_month_is_taken_off_are_stored_again(pool: asyncpg.Pool) -> None:
    store, reached = DeliveriesStore(pool, 0), Checkpoint(EPOCH, MANY)
    assert await store.apply(many_ranges(1, 40), None, reached)
    async with pool.acquire() as keeper:
        async with keeper.transaction():
            [month] = await filled_leaves(keeper, "delivery_ranges_1")
            await keeper.execute(f"ALTER TABLE delivery_ranges_1 DETACH PARTITION {month}")
            again = store.apply(many_ranges(MANY + 1, 1), reached, Checkpoint(EPOCH, 2 * MANY))
            applying = asyncio.create_task(again, name="apply")
            await eventually(lambda: keeper.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
        assert await applying
    assert await pool.fetchval("SELECT count(*) FROM delivery_ranges") == MANY


async def test_a_clock_that_is_wrong_stops_no_projection(pool: asyncpg.Pool) -> None:
    store = InboxStore(pool, 0)
    batch = [stored(seq, days, {"id": f"e{seq}", "kind": "notification"}) for seq, days in ((1, -4000), (2, 4000))]
    assert await store.apply(batch, None, Checkpoint(EPOCH, 2))
    assert len(await stored_inbox(pool)) == 2


async def test_only_the_devices_of_a_user_that_acknowledged_last_are_remembered(pool: asyncpg.Pool) -> None:
    store, at = DeliveriesStore(pool, 0), None
    for start in range(0, 100, 10):
        names = ["phone", *(f"invented-{n}" for n in range(start, start + 10))]
        batch = [
            stored(
                start * 2 + number + 1,
                1 - (start * 2 + number) / 1000,
                {"channel": "inapp", "device": name, "state": "acknowledged", "epoch": EPOCH,
                 "after": 0, "up_to": start + number + 1, "at": AT},
                b"rcpt",
            )
            for number, name in enumerate(names)
        ]  # fmt: skip
        to = Checkpoint(EPOCH, batch[-1].seq)
        assert await store.apply(batch, at, to)
        at = to
    kept = {row["device"] for row in await pool.fetch("SELECT device FROM device_cursors")}
    # Ten phones of one batch each: the last batches are whole, and of the one before the end of it.
    assert len(kept) == DEVICES_MAX
    assert kept == {"phone", *(f"invented-{n}" for n in range(100 - DEVICES_MAX + 1, 100))}


def test_a_month_is_over_when_the_next_one_begins() -> None:
    found = [month_of(name) for name in ("inbox_1_202612", "inbox_12_202702", "inbox_1_3", "inbox_1_202713")]
    assert [str(month.over_at.date()) if month else None for month in found] == ["2027-01-01", "2027-03-01", None, None]
