"""Rows leave the tables by whole months, when their time is over and the log has lost them; counts, pages and verify agree."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg
import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.errors import TopologyError
from engine.postgres import holding
from engine.topology import server as topology
from ops import migrate as migrate_module
from ops.migrate import migrate
from projections.deliveries.table import DeliveriesStore
from projections.inbox.queries import Filter, InboxQueries
from projections.inbox.table import InboxStore
from projections.postgres import versions
from projections.rebuild import unread as unread_rebuild
from projections.rebuild.tables import Rebuild
from projections.rebuild.unread import rebuild_unread
from projections.replay import replay
from projections.retention.months import KEEP_LOCK, Months
from projections.retention.rules import EVERY_TENANT, RetentionTable
from projections.store import Checkpoint
from projections.unread import store as unread_store
from projections.unread.reader import UnreadReader
from projections.unread.store import UnreadStore
from projections.verify import scan
from projections.verify.tables import Verification
from projections.verify.unread import UnreadVerification
from seamark.protocol.subjects import log_subject
from tests.support.logs import FAST, connected, eventually
from tests.support.tables import EPOCH, stored, stored_deliveries, stored_inbox

PLAN = {"inapp": {"when": "now", "why": "default"}}
AT = "2026-01-31T12:00:00Z"


class House(NamedTuple):
    broker: Broker
    pool: asyncpg.Pool
    redis: Redis

    async def append(self, id: str, tenant: str = "default", user: str = "alice") -> int:
        record = {"id": id, "kind": "notification", "tenant": tenant, "user": user, "at": AT, "plan": PLAN}
        return (await self.broker.append(log_subject(0, tenant, user), json.dumps(record).encode())).seq

    async def fold(self) -> None:
        """Fold inbox and counts to the end of the log."""
        newest = await self.broker.leader_last("LOG-0", "log.0.>")
        epoch = (await self.broker.stream("LOG-0")).epoch
        assert newest is not None
        assert epoch is not None
        for store in (InboxStore(self.pool, 0), UnreadStore(self.redis, 0)):
            at = await store.checkpoint()
            start = at.seq + 1 if at else 1
            async for batch in replay(self.broker, "LOG-0", "log.0.>", start, newest.seq):
                to = Checkpoint(epoch, batch[-1].seq)
                assert await store.apply(batch, at, to)
                at = to
            if isinstance(store, UnreadStore):
                await store.close()

    async def purge(self) -> None:
        """What age does: the log holds nothing of what there was."""
        last = (await self.broker.stream("LOG-0")).last_seq
        await self.broker.api("STREAM.PURGE.LOG-0", {"seq": last + 1})

    def months(self) -> Months:
        return Months(self.broker, self.redis, self.pool, 1)

    async def shown(self, tenant: str = "default", user: str = "alice") -> tuple[list[str], int]:
        """The ids of the list, and the count over it."""
        page = await InboxQueries(self.pool, 1).page(tenant, user, Filter(), seconds=20)
        reader = UnreadReader(self.redis)
        [unread] = await reader.unread_of(0, [f"{tenant}.{user}"])
        await reader.close()
        return [json.loads(bytes(row))["id"] for row in page.rows], unread.count

    async def differences(self) -> list[Any]:
        tables = [one async for one in Verification(self.broker, self.pool, "inbox", 1).differences()]
        return tables + [one async for one in UnreadVerification(self.broker, self.redis, 1).differences()]


@pytest.fixture
async def house(nats_server, valkey, postgres, monkeypatch) -> AsyncIterator[House]:
    monkeypatch.setattr(unread_store, "REDIS_SECONDS", 20.0)
    pool = await asyncpg.create_pool(postgres, min_size=1, max_size=6)
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        yield House(broker, pool, redis)
    pool.terminate()


def later(**time: float) -> datetime:
    return datetime.now(UTC) + timedelta(**time)


async def apart(house: House) -> datetime:
    """Make all rows a day older but `new`, which goes a month later. A moment in which their month is over, and its is not."""
    await house.pool.execute(
        "UPDATE inbox SET kept_until = date_trunc('month', kept_until) + interval '1 month 2 days' WHERE id = 'new'"
    )
    await house.pool.execute("UPDATE inbox SET stored_at = stored_at - interval '1 day' WHERE id <> 'new'")
    over_at = await house.pool.fetchval(
        "SELECT date_trunc('month', kept_until) + interval '1 month 1 day' FROM inbox WHERE id <> 'new' LIMIT 1"
    )
    assert isinstance(over_at, datetime)
    return over_at


async def test_rows_whose_time_is_over_leave_the_list_and_the_count_and_verify_finds_no_difference(
    house: House,
) -> None:
    await house.append("old")
    await house.fold()
    await house.purge()
    assert await house.shown() == (["old"], 1)
    await house.months().keep(later(days=89))
    assert await house.shown() == (["old"], 1)
    await house.months().keep(later(days=90 + 32))
    assert await house.shown() == ([], 0)
    await house.append("new")
    await house.fold()
    assert await house.shown() == (["new"], 1)
    assert await house.differences() == []


async def test_rows_that_the_log_still_holds_stay_whatever_time_is_set(house: House) -> None:
    await RetentionTable(house.pool).set(EVERY_TENANT, 1)
    await house.pool.execute("UPDATE retention SET not_before = NULL")
    await house.append("held")
    await house.fold()
    await house.months().keep(later(days=70))
    assert await house.shown() == (["held"], 1)
    assert await house.differences() == []
    await house.purge()
    await house.months().keep(later(days=70))
    assert await house.shown() == ([], 0)


async def test_a_tenant_with_a_shorter_time_leaves_earlier_and_nobody_else_does(house: House) -> None:
    await RetentionTable(house.pool).set("brief", 20)
    await RetentionTable(house.pool).set("long", 300)
    await house.pool.execute("UPDATE retention SET not_before = NULL")
    for tenant in ("brief", "default", "long"):
        await house.append("a", tenant)
    await house.fold()
    await house.purge()
    await house.months().keep(later(days=20 + 32))
    assert await house.shown("brief") == ([], 0)
    assert await house.shown() == (["a"], 1)
    await house.months().keep(later(days=90 + 32))
    assert await house.shown() == ([], 0)
    assert await house.shown("long") == (["a"], 1)


async def test_a_rebuild_gives_all_rows_the_time_that_is_set_now(house: House) -> None:
    await house.append("a")
    await house.fold()
    await house.purge()
    await house.append("b")
    await house.fold()
    await RetentionTable(house.pool).set(EVERY_TENANT, 30)
    await Rebuild(house.broker, house.pool, "inbox", 1).run()
    days = await house.pool.fetch("SELECT kept_until - stored_at AS kept FROM inbox")
    assert {round(row["kept"] / timedelta(days=1)) for row in days} == {30}
    assert [row["id"] for row in await stored_inbox(house.pool)] == ["a", "b"]


async def test_a_month_whose_projector_died_before_dropping_it_is_dropped_by_the_next_one(house: House) -> None:
    await house.append("old")
    await house.fold()
    await house.purge()
    part = await house.pool.fetchval("SELECT tableoid::regclass::text FROM inbox")
    assert await house.months()._take_out([part])
    assert await house.shown() == ([], 1)
    assert part in await house.months().keep()
    assert await house.shown() == ([], 0)


async def test_a_month_that_is_being_read_is_not_waited_for_and_goes_the_next_time(house: House, monkeypatch) -> None:
    monkeypatch.setattr(versions, "LOCK_SECONDS", 0.05)
    await house.append("old")
    await house.fold()
    await house.purge()
    months, queries = house.months(), InboxQueries(house.pool, 1)
    over = asyncio.Event()
    await months.keep(later(days=89))

    async def look() -> None:
        while not over.is_set():
            await queries.page("default", "alice", Filter(), seconds=20)
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    async with house.pool.acquire() as backup, backup.transaction():
        await backup.fetch("SELECT * FROM inbox")
        await months.keep(later(days=90 + 32))
        assert await house.shown() == (["old"], 1)
    over.set()
    await looking
    await months.keep(later(days=90 + 32))
    assert await house.shown() == ([], 0)


async def test_one_of_two_projectors_keeps_the_months_and_makes_those_to_come(house: House) -> None:
    name = f"inbox_1_{later(days=45):%Y%m}"  # one that is made whether or not a new month begins meanwhile
    await house.pool.execute(f"DROP TABLE {name}")
    async with holding(house.pool, KEEP_LOCK) as mine, holding(house.pool, KEEP_LOCK) as too:
        assert (mine is None, too is None) == (False, True)
        await house.months().keep()

    async def is_free() -> bool:
        async with holding(house.pool, KEEP_LOCK) as too:
            return too is not None

    await eventually(is_free)  # the server lets go of it once it sees that the connection has ended
    assert await house.pool.fetchval("SELECT to_regclass($1)::text", name) == name


async def test_cursors_of_devices_that_were_silent_for_as_long_as_rows_are_kept_are_forgotten(house: House) -> None:
    ack = {
        "channel": "inapp",
        "device": "tv",
        "state": "acknowledged",
        "epoch": EPOCH,
        "after": 0,
        "up_to": 3,
        "at": AT,
    }
    assert await DeliveriesStore(house.pool, 0).apply([stored(1, 10, ack, b"rcpt")], None, Checkpoint(EPOCH, 1))
    months = house.months()
    await months.keep(later(days=79))
    assert await house.pool.fetchval("SELECT count(*) FROM device_cursors") == 1
    await months.keep(later(days=81))
    assert await house.pool.fetchval("SELECT count(*) FROM device_cursors") == 0


async def test_a_filled_database_migrates_without_touching_a_row_and_a_rebuild_divides_it(
    nats_server, valkey, empty_postgres, monkeypatch
) -> None:
    upgrade = migrate_module.command.upgrade
    with monkeypatch.context() as patch:
        patch.setattr(migrate_module.command, "upgrade", lambda config, _: upgrade(config, "0002"))
        await migrate(empty_postgres)
    pool = await asyncpg.create_pool(empty_postgres, min_size=1, max_size=6)
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        house = House(broker, pool, redis)
        for number in range(4):
            await house.append(f"e{number}")
        epoch = (await broker.stream("LOG-0")).epoch
        await pool.execute(
            "INSERT INTO inbox (version, tenant, user_id, id, era, seq, epoch, stored_at, channels, shown, record)"
            " SELECT 1, 'default', 'alice', 'e' || n, 1, n + 1, $1, now(), '{inapp}', true, '{}' FROM generate_series(0, 3) n",
            epoch,
        )
        await pool.execute("INSERT INTO projection_checkpoints VALUES ('inbox', 1, 'LOG-0', 0, $1, 1, 4, now())", epoch)
        await pool.execute(
            "INSERT INTO delivery_ranges VALUES (1, 'default', 'alice', 'tv', 'inapp', 'sent', $1, 0, 3, now(), NULL)",
            EPOCH,
        )
        rows = "SELECT tenant, user_id, id, era, seq, epoch, stored_at, record FROM inbox ORDER BY seq"
        before = await pool.fetch(rows)
        await migrate(empty_postgres)
        assert await pool.fetch(rows) == before
        told = {"channel": "inapp", "device": "tv", "epoch": EPOCH, "after": 0, "up_to": 3, "at": AT}
        mail = {"id": "e1", "channel": "email", "state": "sent", "at": AT}
        receipts = [stored(n + 1, 1, one, b"rcpt") for n, one in enumerate([{**told, "state": "sent"}, mail])]
        assert await DeliveriesStore(pool, 0).apply(receipts, None, Checkpoint(EPOCH, 2))
        assert len((await stored_deliveries(pool))["ranges"]) == 1
        await house.append("afterwards")
        await house.fold()  # the old division takes new rows
        assert not [name for name in await house.months().keep(later(days=1000)) if name.startswith("inbox")]
        assert len(await stored_inbox(pool)) == 5
        await Rebuild(broker, pool, "inbox", 1).run()
        await Rebuild(broker, pool, "deliveries", 1).run()
        found = await stored_deliveries(pool)
        assert (len(found["ranges"]), len(found["deliveries"])) == (1, 1)
        divided = "SELECT count(*) FROM pg_partitioned_table WHERE partstrat = 'r'"
        assert await pool.fetchval(divided) == 3
        assert [row["id"] for row in await stored_inbox(pool)] == [*(f"e{n}" for n in range(4)), "afterwards"]
        await house.purge()
        await house.months().keep(later(days=90 + 32))
        assert await stored_inbox(pool) == []
    pool.terminate()


async def test_what_a_former_log_left_unread_leaves_the_count_with_its_row(house: House) -> None:
    await house.append("old")
    await house.append("read again", user="bob")
    await house.fold()
    await house.broker.api("STREAM.DELETE.LOG-0")
    await topology.ensure(house.broker, "dev", 1, overrides=FAST)
    await house.append("new", user="bob")
    await Rebuild(house.broker, house.pool, "inbox", 1).run()
    await rebuild_unread(house.broker, house.redis, 1)
    assert await house.shown() == (["old"], 1)
    over_at = await apart(house)
    await house.purge()
    await house.months().keep(over_at)
    assert await house.shown() == ([], 0)
    assert await house.shown(user="bob") == (["new"], 1)


async def test_an_id_that_comes_again_after_its_row_has_left_is_new_in_list_and_count(house: House) -> None:
    await house.append("again")
    await house.append("again", user="bob")
    await house.fold()
    await house.broker.append(
        log_subject(0, "default", "bob"), b'{"id":"r","kind":"read","ids":["again"],"user":"bob"}'
    )
    await house.fold()
    await house.purge()
    await house.months().keep(later(days=90 + 32))
    assert await house.redis.keys("unread:*:r:*") == []
    for user in ("alice", "bob"):
        await house.append("again", user=user)
    await house.fold()
    for user in ("alice", "bob"):
        assert await house.shown(user=user) == (["again"], 1)
    assert await house.differences() == []


async def test_what_leaves_while_the_counts_are_rebuilt_is_not_counted_by_the_new_version(
    house: House, monkeypatch
) -> None:
    await house.append("old")
    await house.fold()
    await house.purge()
    await house.append("new", user="bob")
    await house.fold()
    over_at = await apart(house)
    fold = unread_rebuild._Counts.fold
    left = []

    async def fold_and_age(self: Any) -> None:
        await fold(self)
        if not left:
            left.extend(await house.months().keep(over_at))

    monkeypatch.setattr(unread_rebuild._Counts, "fold", fold_and_age)
    await rebuild_unread(house.broker, house.redis, 1)
    assert left
    assert await house.shown() == ([], 0)
    assert await house.shown(user="bob") == (["new"], 1)


async def test_a_retention_that_is_set_while_the_tables_are_rebuilt_is_not_held_for_some_rows_only(
    house: House,
) -> None:
    await house.append("a")
    await house.fold()
    work = Rebuild(house.broker, house.pool, "inbox", 1)
    fold = work._fold_until_caught_up

    async def fold_and_set() -> None:
        await fold()
        await RetentionTable(house.pool).set(EVERY_TENANT, 30)

    work._fold_until_caught_up = fold_and_set  # type: ignore[method-assign]
    with pytest.raises(TopologyError, match="a retention was set"):
        await work.run()
    assert await house.shown() == (["a"], 1)


async def test_a_row_whose_id_came_again_stays_until_the_log_has_lost_the_repetition_too(house: House) -> None:
    await house.append("again")
    await house.broker.append(log_subject(0, "default", "alice"), b'{"id":"r","kind":"read","ids":["again"]}')
    await house.fold()
    await house.purge()
    await house.append("again")  # it was read, and stays so
    await house.fold()
    await house.pool.execute("UPDATE inbox SET stored_at = stored_at - interval '1 day'")
    for _ in range(2):
        await house.months().keep(later(days=90 + 32))
        assert await house.shown() == (["again"], 0)
        assert await house.differences() == []
        await Rebuild(house.broker, house.pool, "inbox", 1).run()
        await rebuild_unread(house.broker, house.redis, 1)
    await house.purge()
    await house.months().keep(later(days=90 + 32))
    assert (await house.shown())[0] == []


async def test_what_leaves_while_the_inbox_is_rebuilt_does_not_stand_in_the_list_again(
    house: House, monkeypatch
) -> None:
    await house.append("old")
    await house.fold()
    await house.purge()
    work = Rebuild(house.broker, house.pool, "inbox", 1)
    fold = work._fold_until_caught_up

    async def fold_and_age() -> None:
        await fold()
        assert await house.months().keep(later(days=90 + 32))

    monkeypatch.setattr(work, "_fold_until_caught_up", fold_and_age)
    with pytest.raises(TopologyError, match="a month has left"):
        await work.run()
    assert await house.shown() == ([], 0)
    await Rebuild(house.broker, house.pool, "inbox", 1).run()
    assert await house.shown() == ([], 0)


async def test_a_month_is_not_taken_out_of_a_version_that_is_no_longer_read(house: House) -> None:
    await house.append("old")
    await house.fold()
    part = await house.pool.fetchval("SELECT tableoid::regclass::text FROM inbox")
    await house.pool.execute("UPDATE projection_versions SET version = 2 WHERE projection = 'inbox'")
    assert not await house.months()._take_out([part])
    assert await house.pool.fetchval("SELECT count(*) FROM inbox") == 1


async def test_a_record_stored_by_a_leader_whose_clock_was_late_is_still_in_the_log(house: House) -> None:
    await house.append("held")
    await house.fold()
    await house.pool.execute("UPDATE inbox SET stored_at = stored_at - interval '1 minute'")
    await house.months().keep(later(days=90 + 32))
    assert await house.shown() == (["held"], 1)


async def test_a_cursor_stays_while_the_stream_holds_its_acknowledgement(house: House) -> None:
    ack = {"user": "alice", "channel": "inapp", "device": "tv", "state": "acknowledged", "epoch": EPOCH,
           "after": 0, "up_to": 3, "at": f"{later():%Y-%m-%dT%H:%M:%SZ}"}  # fmt: skip
    seq = (await house.broker.append("rcpt.0.default.alice", json.dumps(ack).encode())).seq
    epoch = (await house.broker.stream("RECEIPTS")).epoch
    assert epoch is not None
    async for batch in replay(house.broker, "RECEIPTS", "rcpt.0.>", 1, seq):
        assert await DeliveriesStore(house.pool, 0).apply(batch, None, Checkpoint(epoch, seq))
    await house.months().keep(later(days=200))
    assert await house.pool.fetchval("SELECT count(*) FROM device_cursors") == 1
    assert [one async for one in Verification(house.broker, house.pool, "deliveries", 1).differences()] == []
    await house.broker.api("STREAM.PURGE.RECEIPTS")
    await house.months().keep(later(days=200))
    assert await house.pool.fetchval("SELECT count(*) FROM device_cursors") == 0


async def test_a_month_that_goes_in_the_midst_of_a_verification_is_no_difference_and_does_not_end_it(
    house: House, monkeypatch
) -> None:
    await house.append("old")
    await house.fold()
    await house.purge()
    await house.append("new")
    await house.fold()
    over_at = await apart(house)
    parts_of = scan.parts_of

    async def then_age(*args: Any) -> Any:
        found = await parts_of(*args)
        assert await house.months().keep(over_at)
        return found

    monkeypatch.setattr(scan, "parts_of", then_age)
    assert [one async for one in Verification(house.broker, house.pool, "inbox", 1).differences()] == []
