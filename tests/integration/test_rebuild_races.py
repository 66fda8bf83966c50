"""Rebuilds that meet each other, readers, or a projector that is behind: nobody loses a row, and readers do not wait."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import asyncpg
import pytest

from engine.broker.jetstream import Broker
from engine.errors import StoreUnavailable
from engine.topology import server as topology
from projections.deliveries.table import DeliveriesStore
from projections.inbox.queries import Filter, InboxQueries
from projections.inbox.table import InboxStore
from projections.postgres import versions
from projections.rebuild.tables import Rebuild
from projections.replay import replay
from projections.store import Checkpoint, Store
from projections.verify.streams import StreamVerification
from projections.verify.tables import Verification
from seamark.protocol.errors import SeamarkError
from seamark.protocol.records import state_record
from seamark.protocol.subjects import log_subject, receipt_subject
from tests.support.logs import FAST, connected, eventually
from tests.support.tables import stored_deliveries, stored_inbox

PARTITIONS = 1
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
AT = "2026-01-31T12:00:00Z"


class House(NamedTuple):
    broker: Broker
    pool: asyncpg.Pool

    async def append(self, id: str, user: str = "alice", **more: Any) -> int:
        record = {"id": id, "kind": "notification", "tenant": "default", "user": user, "at": AT, "plan": {}, **more}
        return (await self.broker.append(log_subject(0, "default", user), json.dumps(record).encode())).seq

    async def read(self, user: str = "alice", **what: Any) -> int:
        _, record = state_record("read", tenant="default", user=user, device="phone", **what)
        return (await self.broker.append(log_subject(0, "default", user), record)).seq

    async def receipt(self, **body: Any) -> int:
        content = {"user": "alice", "channel": "email", "id": "e1", **body}
        return (await self.broker.append(receipt_subject(0, "default", "alice"), json.dumps(content).encode())).seq

    async def fold(self, stream: str = "LOG-0", up_to: int | None = None) -> None:
        """What a projector does, up to a sequence."""
        store: Store = InboxStore(self.pool, 0) if stream == "LOG-0" else DeliveriesStore(self.pool, 0)
        subject = "log.0.>" if stream == "LOG-0" else "rcpt.0.>"
        newest = await self.broker.leader_last(stream, subject)
        epoch = (await self.broker.stream(stream)).epoch
        assert newest is not None
        assert epoch is not None
        at = await store.checkpoint()
        start = at.seq + 1 if at else 1
        async for batch in replay(self.broker, stream, subject, start, up_to or newest.seq):
            to = Checkpoint(epoch, batch[-1].seq)
            assert await store.apply(batch, at, to)
            at = to

    def rebuild(self, projection: str = "inbox", tenant: str | None = None) -> Rebuild:
        return Rebuild(self.broker, self.pool, projection, PARTITIONS, tenant=tenant)

    async def differences(self, projection: str = "inbox") -> list[Any]:
        return [one async for one in Verification(self.broker, self.pool, projection, PARTITIONS).differences()]


@pytest.fixture
async def house(nats_server, postgres) -> AsyncIterator[House]:
    pool = await asyncpg.create_pool(postgres, min_size=1, max_size=6)
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        yield House(broker, pool)
    pool.terminate()


async def test_of_two_rebuilds_at_once_one_gives_up_and_no_row_is_lost(house: House) -> None:
    for number in range(5):
        await house.append(f"e{number}")
    await house.fold()
    await house.broker.api("STREAM.PURGE.LOG-0", {"seq": 3})  # the first two live in the table only
    before = await stored_inbox(house.pool)
    first, second = house.rebuild(), house.rebuild()
    switch = first._switch

    async def when_another_has_begun() -> None:
        await second._begin()
        await switch()

    first._switch = when_another_has_begun  # type: ignore[method-assign]
    with pytest.raises(SeamarkError, match="another rebuild"):
        await first.run()
    assert await stored_inbox(house.pool) == before
    await house.rebuild().run()
    assert await stored_inbox(house.pool) == before
    assert await house.differences() == []


async def test_a_long_look_at_the_tables_does_not_keep_readers_waiting_for_the_end_of_a_rebuild(
    house: House, monkeypatch
) -> None:
    monkeypatch.setattr(versions, "LOCK_SECONDS", 0.05)
    await house.append("e1")
    await house.fold()
    queries = InboxQueries(house.pool, PARTITIONS)
    over = asyncio.Event()

    async def look() -> None:
        while not over.is_set():
            assert len((await queries.page("default", "alice", Filter(), seconds=20)).rows) == 1
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    async with house.pool.acquire() as backup, backup.transaction():
        await backup.fetch("SELECT * FROM inbox")
        await asyncio.wait_for(house.rebuild().run(), 60)
    over.set()
    await looking
    done = await house.rebuild().run()
    tables = await house.pool.fetch(
        "SELECT c.relname FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid WHERE h.inhparent = 'inbox'::regclass"
    )
    assert [row["relname"] for row in tables] == [f"inbox_{done.version}"]


async def test_a_batch_that_waited_for_the_switch_changes_nothing_and_the_old_version_is_dropped(house: House) -> None:
    await house.append("e1")
    await house.fold()
    late = await house.append("e2")
    rebuild, waiting = house.rebuild(), []
    catch_up = rebuild._catch_up
    store = InboxStore(house.pool, 0)
    at = await store.checkpoint()
    assert at is not None
    [batch] = [found async for found in replay(house.broker, "LOG-0", "log.0.>", late, late)]

    async def while_a_projector_waits(p: int, live: Checkpoint) -> None:
        waiting.append(asyncio.create_task(store.apply(batch, at, Checkpoint(at.epoch, late))))
        await eventually(lambda: house.pool.fetchval(WAITING))
        await catch_up(p, live)

    rebuild._catch_up = while_a_projector_waits  # type: ignore[method-assign]
    done = await rebuild.run()
    assert await waiting[0] is False
    tables = await house.pool.fetch(
        "SELECT c.relname FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid WHERE h.inhparent = 'inbox'::regclass"
    )
    assert [row["relname"] for row in tables] == [f"inbox_{done.version}"]
    assert [row["id"] for row in await stored_inbox(house.pool)] == ["e1", "e2"]


async def test_a_tenant_rebuilt_while_its_projector_is_behind_is_what_the_fold_gives(house: House) -> None:
    first = await house.append("e1")
    await house.append("other", user="bob")
    await house.fold(up_to=first)
    await house.read(ids=["e1", "e2"])  # e2 comes later: it stays unread
    await house.append("e2")
    await house.rebuild(tenant="default").run()
    await house.fold()
    assert await house.differences() == []
    assert {row["id"]: row["read_seq"] is not None for row in await stored_inbox(house.pool)} == {
        "e1": True,
        "e2": False,
        "other": False,
    }


@pytest.mark.parametrize("wrong", ["epoch = 'zzzzzzzz'", "era = 7"])
async def test_a_row_with_another_place_than_its_record_has_is_a_difference(house: House, wrong: str) -> None:
    await house.append("e1")
    await house.fold()
    await house.pool.execute(f"UPDATE inbox SET {wrong}")
    assert len(await house.differences()) == 1


async def test_what_trimmed_receipts_said_of_a_delivery_outlives_a_rebuild(house: House) -> None:
    await house.receipt(state="sent", at="2026-01-01T12:00:00Z", attempt=1)
    kept = await house.receipt(state="read", at="2036-02-20T12:00:00Z")
    await house.fold("RECEIPTS")
    before = await stored_deliveries(house.pool)
    await house.broker.api("STREAM.PURGE.RECEIPTS", {"seq": kept})
    assert await house.differences("deliveries") == []
    await house.rebuild("deliveries").run()
    assert await stored_deliveries(house.pool) == before


@pytest.mark.parametrize("projection", ["inbox", "deliveries"])
async def test_a_verification_in_whose_midst_a_rebuild_switches_finds_no_difference(
    house: House, projection: str, monkeypatch
) -> None:
    await house.append("e1")
    await house.fold()
    await house.receipt(state="sent", at=AT)
    await house.fold("RECEIPTS")
    work = Verification(house.broker, house.pool, projection, PARTITIONS)
    read = StreamVerification._read_stream

    async def then_rebuild(self: Any, *args: Any) -> None:
        await read(self, *args)
        await house.rebuild(projection).run()

    monkeypatch.setattr(StreamVerification, "_read_stream", then_rebuild)
    assert [one async for one in work.differences()] == []
    assert work.result.compared == 1
    assert await house.differences(projection) == []


async def test_a_rebuild_outlives_a_broker_that_restarts_before_it_has_looked_at_the_logs(
    house: House, nats_server
) -> None:
    for number in range(5):
        await house.append(f"e{number}")
    await house.fold()
    before = await stored_inbox(house.pool)
    rebuild = house.rebuild()
    begin = rebuild._begin

    async def and_then_the_broker_is_away() -> None:
        await begin()
        await asyncio.to_thread(nats_server.kill)
        await eventually(lambda: not house.broker.connected)

    rebuild._begin = and_then_the_broker_is_away  # type: ignore[method-assign]
    done = asyncio.create_task(rebuild.run())
    await eventually(lambda: not house.broker.connected)
    await asyncio.to_thread(nats_server.start)
    assert (await done).records == 5
    assert await stored_inbox(house.pool) == before


async def test_a_rebuild_outlives_a_database_that_drops_its_connections(house: House, monkeypatch) -> None:
    for number in range(5):
        await house.append(f"e{number}")
    await house.fold()
    before = await stored_inbox(house.pool)
    await house.broker.api("STREAM.PURGE.LOG-0", {"seq": 3})
    killed, apply = [], InboxStore.apply

    async def applied(self: InboxStore, *batch: Any) -> bool:
        """The outcome of the first try is unknown: it was committed, and nobody heard of it."""
        done = await apply(self, *batch)
        if not killed:
            killed.append(done)
            raise StoreUnavailable("PostgreSQL: connection was closed in the middle of operation")
        return done

    monkeypatch.setattr(InboxStore, "apply", applied)
    done = await house.rebuild().run()
    assert killed == [True]
    assert done.carried == 2
    assert await stored_inbox(house.pool) == before
    assert await house.differences() == []


async def test_what_age_takes_from_the_log_during_a_rebuild_is_carried_over_too(house: House) -> None:
    for number in range(6):
        await house.append(f"e{number}")
    await house.fold()
    await house.broker.api("STREAM.PURGE.LOG-0", {"seq": 3})
    before = await stored_inbox(house.pool)
    rebuild = house.rebuild()
    carry = rebuild._carry

    async def and_then_more_is_trimmed() -> None:
        await carry()
        await house.broker.api("STREAM.PURGE.LOG-0", {"seq": 5})

    rebuild._carry = and_then_more_is_trimmed  # type: ignore[method-assign]
    done = await rebuild.run()
    assert (done.carried, done.records) == (4, 2)
    assert await stored_inbox(house.pool) == before


async def test_a_log_that_is_made_anew_during_a_rebuild_is_not_taken_for_the_one_that_was_read(house: House) -> None:
    await house.append("e1")
    await house.fold()
    before = await stored_inbox(house.pool)
    rebuild = house.rebuild()
    fold = rebuild._fold_all

    async def and_then_the_log_is_gone() -> None:
        await fold()
        await house.broker.api("STREAM.DELETE.LOG-0")
        await topology.ensure(house.broker, "dev", PARTITIONS, overrides=FAST)

    rebuild._fold_all = and_then_the_log_is_gone  # type: ignore[method-assign]
    with pytest.raises(SeamarkError, match="made anew"):
        await rebuild.run()
    assert await stored_inbox(house.pool) == before
