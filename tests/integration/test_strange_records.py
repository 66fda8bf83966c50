"""What a stray publisher puts into logs and receipts: it is passed over and counted, and no projection stops for it."""

import json
import random
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from engine.partition.reader import Delivered
from engine.topology import server as topology
from projections.deliveries.table import DeliveriesStore
from projections.folds import inbox as inbox_fold
from projections.inbox.queries import Filter, InboxQueries
from projections.inbox.table import InboxStore
from projections.store import Checkpoint, Store
from projections.unread import store as unread_store
from projections.unread.store import UnreadStore
from seamark.protocol.subjects import EVENTS_STREAM
from tests.support.logs import FAST, connected
from tests.support.tables import EPOCH, expected_deliveries, expected_inbox, stored_deliveries, stored_inbox

LONG = "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz0123456789äöü", k=9000))
FIRST, LAST = "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"
NOTIFICATION = {"id": "e1", "kind": "notification"}
RECEIPT = {"user": "u", "channel": "email", "state": "sent", "at": "2026-01-31T12:00:00Z"}
RANGE = {**RECEIPT, "channel": "inapp", "epoch": EPOCH, "after": 0, "up_to": 3}


def stream(subject: bytes, *bodies: Any) -> list[Delivered]:
    return [
        Delivered(subject, seq, 1_800_000_000_000_000_000, b"", json.dumps(body).encode())
        for seq, body in enumerate(bodies, 1)
    ]


async def fold_in(store: Store, batch: list[Delivered]) -> None:
    assert await store.apply(batch, None, Checkpoint(EPOCH, batch[-1].seq))


@pytest.mark.parametrize(
    "strange",
    [
        {**NOTIFICATION, "id": LONG},
        {**NOTIFICATION, "collapse_key": LONG},
        {**NOTIFICATION, "expires_at": FIRST},
        {**NOTIFICATION, "expires_at": LAST},
        {"id": "r", "kind": "read", "ids": ["sound", LONG], "at": FIRST, "device": LONG},
    ],
    ids=["id", "collapse key", "the first hour", "the last hour", "read"],
)
async def test_a_strange_record_does_not_stop_the_inbox(pool: asyncpg.Pool, strange: Any) -> None:
    log = stream(b"log.0.default.alice", {**NOTIFICATION, "id": "sound"}, strange)
    await fold_in(InboxStore(pool, 0), log)
    assert await stored_inbox(pool) == expected_inbox(log)
    assert "sound" in {row["id"] for row in await stored_inbox(pool)}


@pytest.mark.parametrize(
    "strange",
    [
        {**RECEIPT, "id": LONG},
        {**RECEIPT, "id": "e1", "device": LONG},
        {**RECEIPT, "id": "e1", "channel": LONG},
        {**RECEIPT, "id": "e1", "at": FIRST},
        {**RANGE, "device": LONG, "state": "acknowledged"},
        {**RANGE, "epoch": LONG},
        {**RANGE, "at": LAST, "sent_at": FIRST},
    ],
)
async def test_a_strange_receipt_does_not_stop_the_deliveries(pool: asyncpg.Pool, strange: Any) -> None:
    receipts = stream(b"rcpt.0.default.alice", {**RECEIPT, "id": "sound"}, strange)
    await fold_in(DeliveriesStore(pool, 0), receipts)
    stored = await stored_deliveries(pool)
    assert stored == expected_deliveries(receipts)
    assert ("default", "alice", "sound", "email", "") in stored["deliveries"]


async def test_a_name_that_postgres_cannot_hold_stops_no_table(pool: asyncpg.Pool) -> None:
    """A NUL is a letter like others in names, and none in PostgreSQL: whoever publishes to such a user stops nobody else."""
    sound = stream(b"log.0.default.alice", NOTIFICATION)
    strange = [msgspec.structs.replace(sound[0], subject=b"log.0.%b" % name) for name in (b"default.a=00", b"=00.a")]
    log = [msgspec.structs.replace(one, seq=seq) for seq, one in enumerate([*strange, *sound], 1)]
    await fold_in(InboxStore(pool, 0), log)
    assert [row["user_id"] for row in await stored_inbox(pool)] == ["alice"]
    await fold_in(DeliveriesStore(pool, 0), stream(b"rcpt.0.default.a=00", {**RECEIPT, "id": "e1"}))
    assert (await stored_deliveries(pool))["deliveries"] == {}
    queries = InboxQueries(pool, 1)
    assert (await queries.page("default", "a\0", Filter())).rows == []
    assert await queries.ids("default", "alice", Filter(category="a\0"), 10) == []
    assert await queries.ids("default", "a\0", Filter(), 10) == []
    assert await queries.device_cursor("default", "a\0", "phone") is None


async def test_a_subject_that_is_no_text_stops_no_projection(pool: asyncpg.Pool, valkey, monkeypatch) -> None:
    """The broker takes any bytes but blanks for a token."""
    monkeypatch.setattr(unread_store, "REDIS_SECONDS", 20.0)
    sound = Delivered(b"log.0.default.alice", 2, 1_800_000_000_000_000_000, b"", json.dumps(NOTIFICATION).encode())
    log = [*stream(b"log.0.default.al\xffice", NOTIFICATION), sound]
    await fold_in(InboxStore(pool, 0), log)
    assert len(inbox_fold.decoded(log)) == 1
    await fold_in(DeliveriesStore(pool, 0), stream(b"rcpt.0.default.al\xffice", RECEIPT))
    async with Redis.from_url(valkey.url) as redis:
        store = UnreadStore(redis, 0)
        await fold_in(store, log)
        await store.close()
        assert await redis.keys("unread:{0:1}:s:*") == [b"unread:{0:1}:s:default.alice"]


async def test_a_subject_that_is_no_text_can_be_read_over(nats_server) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        broker.publish(b"events.default.al\xffice.demo", b"{}")
        await broker.append("events.default.alice.demo", b"{}")
        page = await broker.next_by_subject(EVENTS_STREAM, "ev.0.>", 1, timeout_seconds=20)
        assert [stored.seq for stored in page.records] == [1, 2]
        assert (await broker.leader_next(EVENTS_STREAM, "ev.0.>", 1)) is not None
