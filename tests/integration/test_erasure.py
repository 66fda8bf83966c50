"""Users who were deleted leave nothing, whatever is under way: on real servers, with dispatcher, projector and gateway."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from engine.broker.jetstream import Broker
from engine.campaigns.commands import Campaigns
from engine.campaigns.draft import Audience, Draft, Message
from engine.directory import topics, users
from engine.directory.changing import Directory, UserDeleted
from engine.directory.push_tokens import NewToken, register_token
from engine.directory.users import UserFields, UserPatch, merge_user, put_user
from engine.errors import Unavailable
from engine.postgres import transaction
from engine.topology import server as topology
from gateway.access.principals import Scope
from projections import erasure
from projections.erasure import Deletion, Eraser, find_deletion
from projections.unread.reader import UnreadReader
from seamark.protocol.subjects import bulk_subject, log_stream, log_subject, receipt_subject
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import FAST, connected, dispatching, eventually, publish
from tests.support.patience import wait_for_stores
from tests.support.tables import projecting_tables
from tests.support.tokens import bearer

PARTITIONS = 4
TENANT = "default"


@dataclass
class House:
    """Real servers, and an eraser whose rounds the test makes."""

    nats: Any
    valkey: Any
    postgres: str
    broker: Broker
    redis: Redis
    pool: asyncpg.Pool
    eraser: Eraser
    work: AsyncExitStack

    async def start_roles(self) -> None:
        await self.work.enter_async_context(dispatching(self.nats.url, self.valkey.url))
        await self.work.enter_async_context(projecting_tables(self.nats.url, self.valkey.url, self.postgres))

    async def gateway(self) -> TestGateway:
        options: dict[str, Any] = {"postgres_url": self.postgres, "redis_url": self.valkey.url}
        return await self.work.enter_async_context(gateway_on(self.nats, topology_ready=True, **options))

    async def make(self, *ids: str) -> None:
        """Users with all that a directory knows."""
        for id in ids:
            async with Directory(self.pool).changing(TENANT, [id]) as change:
                await put_user(change, id, UserFields(email=f"{id.replace(':', '-')}@example.com"))
                await register_token(change, id, "phone", NewToken(platform="fcm", app="shop", token=id))
            async with transaction(self.pool) as connection:
                await topics.add_members(connection, TENANT, "news", [id])

    async def delete(self, id: str) -> None:
        async with Directory(self.pool).changing(TENANT, [id]) as change:
            await users.delete_user(change, id)

    async def round(self, times: int = 1) -> None:
        """Make passes without waiting until they are due."""
        for _ in range(times):
            await self.pool.execute("UPDATE deletions SET due_at = now()")
            await self.eraser.round()

    async def remains(self, id: str) -> dict[str, int]:
        return await self.eraser.remains(TENANT, id)

    async def erased(self, id: str) -> bool:
        found = await find_deletion(self.pool, TENANT, id)
        return found is not None and found.erased_at is not None

    async def shown(self, id: str, count: int) -> None:
        """Wait until the inbox has so many rows of the user, and all projections have folded all that his log holds."""
        p = self.eraser._partition(TENANT, id)
        stream, reader = log_stream(p), UnreadReader(self.redis)

        async def folded() -> bool:
            if (await self.remains(id)).get("inbox") != count:
                return False
            last = await self.broker.leader_last(stream, log_subject(p, TENANT, id))
            counted = (await reader.read(p, [f"{TENANT}.{id}"])).checkpoint
            return last is not None and counted is not None and counted.seq >= last.seq

        try:
            await eventually(folded)
        finally:
            await reader.close()

    async def dispatched(self, id: str) -> None:
        """Wait until no event from before the deletion waits: what it is to leave in logs is there then."""
        bounds = await self.pool.fetchval("SELECT bounds::text FROM deletions WHERE user_id = $1", id)
        before = msgspec.json.decode(bounds, type=dict[str, tuple[str, int]])
        await eventually(lambda: self.eraser._dispatched(before))

    async def acknowledged(self, cursors: dict[str, str]) -> None:
        """Wait until the tables know that the users have acknowledged these: nothing more is told of their devices then."""

        async def all_of_them() -> bool:
            rows = await self.pool.fetch("SELECT user_id, epoch || '.' || seq FROM device_cursors")
            return {row[0]: row[1] for row in rows} == cursors

        await eventually(all_of_them)


@pytest.fixture
async def house(
    nats_server: Any, valkey: Any, postgres: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[House]:
    wait_for_stores(monkeypatch)
    async with AsyncExitStack() as work, connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        eraser = Eraser(broker, redis, pool, PARTITIONS)
        yield House(nats_server, valkey, postgres, broker, redis, pool, eraser, work)
        await work.aclose()


async def test_no_campaign_that_is_still_to_be_sent_names_a_deleted_user(house: House) -> None:
    await house.make("alice", "bob")
    named, campaigns = Audience(users=("alice", "bob")), Campaigns(house.pool)
    later = datetime.now(UTC) + timedelta(hours=1)
    message = Message(type="sale.autumn")
    await campaigns.create(TENANT, Draft(id="c0", audience=named, exclude=named, message=message, start_at=later))
    await house.delete("alice")
    assert (await house.remains("alice"))["campaigns"] == 1
    await house.round()
    asked = await campaigns.read(TENANT, "c0")
    assert asked.audience == asked.exclude == Audience(users=("bob",))
    assert "campaigns" not in await house.remains("alice")


async def test_a_deleted_user_leaves_nothing_anywhere_and_others_keep_theirs(house: House) -> None:
    await house.start_roles()
    gateway = await house.gateway()
    await house.pool.execute(
        "INSERT INTO api_keys (key_hash, tenant, name, scopes) VALUES ($1, $2, 'test', $3)",
        hashlib.sha256(b"key").digest(), TENANT, list(Scope),
    )  # fmt: skip
    await house.make("alice", "bob")
    for number in range(3):
        await publish(house.broker, to=["alice", "bob"], type="demo.hello", id=f"e{number}")
    await house.shown("alice", 3)
    await house.shown("bob", 3)
    async with gateway.device() as device, gateway.device("bob", name="bobs") as other:
        cursors = {}
        for user, each in (("alice", device), ("bob", other)):
            cursors[user] = (await each.records(3))[-1]["cursor"]
            await each.say("ack", cursor=cursors[user])
            await each.until("live")
        await house.acknowledged(cursors)
        assert {"inbox", "users", "push_tokens", "topic_members", "Redis", "RECEIPTS", "device_cursors"} <= set(
            await house.remains("alice")
        )
        before = await house.remains("bob")
        async with gateway.http.delete(
            f"{gateway.url}/v1/users/alice", headers={"Authorization": "Bearer key"}
        ) as answer:
            assert answer.status == 202
        await house.round()
        reset = await device.until("reset")
        assert reset["inbox"] == [], "the device replaces what it shows by nothing"
        await house.round(3)
        assert await house.remains("alice") == {}
        assert await house.erased("alice")
        async with gateway.http.get(f"{gateway.url}/v1/inbox", headers=bearer()) as answer:
            assert (await answer.json())["items"] == []
        after = await house.remains("bob")
        assert {place: after.get(place) for place in before} == before, "nobody else has lost anything"

        # Made anew, he begins with an empty log, and his device goes on.
        async with Directory(house.pool).changing(TENANT, ["alice"]) as change:
            await put_user(change, "alice", UserFields())
        await publish(house.broker, to=["alice"], type="demo.hello", id="anew")
        assert (await device.until("record"))["record"]["id"] == "anew"
        await house.round(2)
        assert (await house.remains("alice"))["users"] == 1, "nobody erases a user who was made anew"


async def test_an_event_from_before_the_deletion_that_is_dispatched_after_it_is_erased_too(house: House) -> None:
    """The purge comes first, the record later: until all that was accepted is dispatched, a user does not count as erased."""
    await house.make("alice")
    for number in range(3):
        await publish(house.broker, to=["bob", "alice"], type="demo.hello", id=f"e{number}", key="shared")
    await house.delete("alice")
    await house.round(4)
    assert await house.remains("alice") == {}
    assert not await house.erased("alice"), "the event waits in EVENTS"
    with pytest.raises(UserDeleted):
        async with Directory(house.pool).changing(TENANT, ["alice"]) as change:
            await put_user(change, "alice", UserFields())
    await house.start_roles()
    await house.dispatched("alice")
    await house.shown("alice", 3)
    await house.round()
    assert await house.remains("alice") == {}
    assert not await house.erased("alice"), (
        "this pass has found something: what was folded meanwhile may still be written"
    )
    await house.round(2)
    assert await house.erased("alice")
    await house.shown("bob", 3)


async def test_an_event_that_waits_in_bulk_keeps_a_user_from_counting_as_erased(house: House) -> None:
    """A lane may be paused for hours: what a campaign has brought there before the deletion still arrives."""
    await house.make("alice")
    event = {"id": "sale", "to": ["bob", "alice"], "type": "sale.autumn"}
    await house.broker.append(bulk_subject(TENANT, "shared", "sale.autumn"), msgspec.json.encode(event))
    await house.delete("alice")
    await house.round(4)
    assert not await house.erased("alice"), "the event waits in BULK"
    await house.broker.append(
        bulk_subject(TENANT, "later", "sale.autumn"), b"{}"
    )  # from after the deletion: nobody waits for it
    await house.start_roles()
    await house.dispatched("alice")
    await house.shown("alice", 1)
    await house.round(3)
    assert await house.erased("alice")
    assert await house.remains("alice") == {}
    await house.shown("bob", 1)


async def test_a_user_whose_pass_fails_keeps_nobody_else_waiting(house: House) -> None:
    await house.make("alice", "bob")
    await house.delete("alice")
    await house.delete("bob")
    await house.pool.execute("UPDATE deletions SET due_at = now() - interval '1 hour' WHERE user_id = 'alice'")
    take_away = house.eraser.take_away

    async def failing(deletion: Deletion) -> dict[str, int] | None:
        if deletion.user == "alice":
            raise Unavailable("LOG-1 has no leader")
        return await take_away(deletion)

    house.eraser.take_away = failing  # type: ignore[method-assign]
    assert await house.eraser.round() == 2
    assert dict(await house.pool.fetch("SELECT user_id, passes FROM deletions")) == {"alice": 0, "bob": 1}
    await house.pool.execute("UPDATE deletions SET due_at = now() + interval '1 hour' WHERE user_id = 'bob'")
    assert await house.eraser.round() == 0, "alice has her next pass in a minute, and not at once"
    house.eraser.take_away = take_away  # type: ignore[method-assign]
    await house.round(3)
    assert await house.erased("alice")


async def test_an_error_that_nobody_foresaw_is_no_outage_and_keeps_nobody_else_waiting(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("alice", "bob"):
        await house.make(user)
        await house.delete(user)
    await house.pool.execute("UPDATE deletions SET due_at = now() - interval '1 hour' WHERE user_id = 'alice'")
    take_away = house.eraser.take_away

    async def failing(deletion: Deletion) -> dict[str, int] | None:
        return {}["none"] if deletion.user == "alice" else await take_away(deletion)

    monkeypatch.setattr(house.eraser, "take_away", failing)
    with capture_logs() as logs:
        assert await house.eraser.round() == 2
    [said] = [line for line in logs if line["event"] == "user_not_erased"]
    assert (said["log_level"], said["why"], said["exc_info"]) == ("error", "KeyError", True)
    assert dict(await house.pool.fetch("SELECT user_id, passes FROM deletions")) == {"alice": 0, "bob": 1}
    assert await house.pool.fetchval("SELECT due_at > now() FROM deletions WHERE user_id = 'alice'"), "not at once"


async def test_a_user_who_could_not_be_called_so_any_more_is_erased_as_all_others(house: House) -> None:
    await house.make("segment:x", "bob")  # as an earlier version let him be
    p, name = house.eraser._partition(TENANT, "segment:x"), "default.segment=3Ax"
    for subject in (f"log.{p}.{name}", f"rcpt.{p}.{name}", f"dlq.job.{name}.push.j1"):
        await house.broker.append(subject, b"{}")
    places = {log_stream(p), "RECEIPTS", "DEAD-LETTERS", "users", "push_tokens", "topic_members"}
    assert set(await house.remains("segment:x")) == places
    for user in ("segment:x", "bob"):
        await house.delete(user)
    await house.round()
    assert not await house.remains("segment:x")
    await house.round(3)
    assert await house.erased("segment:x")
    assert await house.erased("bob")


async def test_a_tenant_that_has_many_deleted_at_once_keeps_no_other_waiting(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "AT_ONCE", 4)
    await house.pool.execute(
        "INSERT INTO deletions (tenant, user_id, deleted_at, due_at)"
        " SELECT 'large', 'u' || n, now(), now() - interval '1 hour' FROM generate_series(1, 100) n"
        " UNION ALL SELECT 'small', 'u' || n, now(), now() FROM generate_series(1, 2) n"
        " UNION ALL SELECT 'none', 'u', now(), now() + interval '1 hour'"
    )
    passed = "SELECT tenant, count(*) FROM deletions WHERE passes > 0 GROUP BY tenant ORDER BY tenant"
    await house.pool.execute("INSERT INTO profiles SELECT tenant, user_id, 1, deleted_at FROM deletions")
    assert await house.eraser.round() == 4
    assert [tuple(row) for row in await house.pool.fetch(passed)] == [("large", 2), ("small", 2)]
    await house.pool.execute("UPDATE deletions SET due_at = now() + interval '1 hour' WHERE passes > 0")
    assert await house.eraser.round() == 4
    assert [tuple(row) for row in await house.pool.fetch(passed)] == [("large", 6), ("small", 2)]


WITHOUT_INDEX = """
WITH leaves AS (
    SELECT relid FROM pg_partition_tree($1::text::regclass) WHERE isleaf
    UNION SELECT oid FROM pg_class WHERE oid = $1::text::regclass AND relkind = 'r'
)
SELECT relid::regclass::text FROM leaves l WHERE NOT EXISTS (
    SELECT FROM pg_index WHERE indrelid = l.relid AND indpred IS NULL AND indnkeyatts >= 2 AND '{tenant,user_id}' = (
        SELECT array_agg(attname::text ORDER BY attname) FROM pg_attribute
        WHERE attrelid = l.relid AND attnum IN (indkey[0], indkey[1])
    )
)
"""


async def test_every_table_has_an_index_by_which_a_deletion_finds_the_rows_of_a_user(house: House) -> None:
    """A pass over a table of millions must not read it."""
    tables = await erasure._tables(house.pool)
    assert {"inbox", "deliveries", "delivery_ranges", "device_cursors", "users", "preferences"} <= set(tables)
    assert {table: await house.pool.fetch(WITHOUT_INDEX, table) for table in tables} == {table: [] for table in tables}


async def test_a_name_full_of_wildcards_is_only_a_name(house: House) -> None:
    """A purge is as wide as its subject: whoever is called `*` must not take everybody with him."""
    names = ("*", ">", "a.*", "topic.>")
    await house.make("bob")
    for user in (*names, "bob"):
        p = house.eraser._partition(TENANT, user)
        await house.broker.append(log_subject(p, TENANT, user), b"{}")
        await house.broker.append(receipt_subject(p, TENANT, user), b"{}")
    for user in names:
        await house.delete(user)
    await house.round()
    for user in names:
        assert await house.remains(user) == {}
    left = await house.remains("bob")
    assert left["RECEIPTS"] == left[log_stream(house.eraser._partition(TENANT, "bob"))] == 1


async def test_what_arrives_after_a_pass_is_found_by_the_next_one(house: House) -> None:
    """A projector that had read the log before the purge writes its rows, an old list adds a member, a device reads on."""
    await house.make("alice")
    await house.delete("alice")
    await house.round(2)
    assert await house.remains("alice") == {}
    await house.start_roles()
    subject = f"log.{house.eraser._partition(TENANT, 'alice')}.{TENANT}.alice"
    record = b'{"id":"late","kind":"notification","at":"2026-01-01T00:00:00Z","plan":{"inapp":{"when":"now","why":"default"}}}'
    await house.broker.append(subject, record)
    await house.shown("alice", 1)
    await house.pool.execute("INSERT INTO topics (tenant, name, members) VALUES ('default', 'late', 1)")
    await house.pool.execute("INSERT INTO topic_members (tenant, topic, user_id) VALUES ('default', 'late', 'alice')")
    await house.round()
    assert await house.remains("alice") == {}
    assert not await house.erased("alice")
    assert await house.pool.fetchval("SELECT members FROM topics WHERE name = 'late'") == 0
    await house.round(2)
    assert await house.erased("alice")
    await house.broker.append(subject, record)  # a day later, by a way that nobody thought of
    await house.shown("alice", 1)
    await house.round()
    assert await house.remains("alice") == {}
    assert await house.erased("alice")


async def test_a_user_erased_again_at_once_does_not_count_as_erased_too_early(house: House) -> None:
    await house.make("alice")
    await house.delete("alice")
    await house.round(2)
    assert not await house.erased("alice"), "half a minute must pass without anything found"
    due = await house.pool.fetchval("SELECT extract(epoch FROM due_at - now()) FROM deletions")
    assert 20 < due <= 31
    await house.round()
    assert await house.erased("alice")
    assert await house.pool.fetchval("SELECT due_at - now() > interval '23 hours' FROM deletions"), "then daily"


async def test_a_pass_that_comes_late_takes_nothing_from_a_user_who_was_made_anew(house: House) -> None:
    """A projector was stopped between its look at the deletion and its pass; meanwhile the user was made anew."""
    await house.make("alice")
    await house.delete("alice")
    await house.round(3)
    deletion = await find_deletion(house.pool, TENANT, "alice")
    assert deletion is not None
    await house.make("alice")
    subject = f"log.{house.eraser._partition(TENANT, 'alice')}.{TENANT}.alice"
    await house.broker.append(subject, b'{"id":"new","kind":"notification"}')
    before = await house.remains("alice")
    assert await house.eraser.take_away(deletion) is None
    await house.eraser._pass(deletion, deletion.deleted_at)
    await house.eraser._forget(deletion)
    assert await house.remains("alice") == before
    assert await house.pool.fetchval("SELECT version FROM profiles WHERE user_id = 'alice'") > 2


async def test_a_tombstone_ends_with_its_time_and_not_before(house: House) -> None:
    await house.make("alice")
    await house.delete("alice")
    await house.round(3)
    for days, left in ((30, 1), (32, 0)):
        for table in ("deletions", "profiles"):
            await house.pool.execute(f"UPDATE {table} SET deleted_at = now() - interval '{days} days'")
        await house.pool.execute("UPDATE profiles SET deleted_at = d.deleted_at FROM deletions d")
        await house.round()
        assert await house.pool.fetchval("SELECT count(*) FROM deletions") == left
        assert await house.pool.fetchval("SELECT count(*) FROM profiles WHERE user_id = 'alice'") == left
    async with Directory(house.pool).changing(TENANT, ["alice"]) as change:
        await merge_user(change, "alice", UserPatch(locale="de"))


async def test_a_table_that_has_a_user_is_erased_whoever_adds_it(house: House) -> None:
    await house.pool.execute("CREATE TABLE later_on (tenant text, user_id text, what text)")
    await house.pool.execute("CREATE TABLE nobodys (tenant text, what text)")
    await house.pool.execute(
        "INSERT INTO later_on VALUES ('default', 'alice', 'x'), ('other', 'alice', 'x'), ('default', 'bob', 'x')"
    )
    assert await house.remains("alice") == {"later_on": 1}
    await house.delete("alice")
    await house.round()
    assert await house.remains("alice") == {}
    assert await house.pool.fetchval("SELECT count(*) FROM later_on") == 2


async def test_one_projector_erases_while_the_others_wait(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "AGAIN_SECONDS", (3600,))  # a second pass is one that both have made
    await house.make(*(f"u{n}" for n in range(5)))
    for number in range(5):
        await house.delete(f"u{number}")
    async with asyncpg.create_pool(house.postgres, min_size=0, max_size=4) as pool:
        workers = [asyncio.create_task(Eraser(house.broker, house.redis, pool, PARTITIONS).run()) for _ in range(2)]

        async def passed() -> bool:
            return bool(await house.pool.fetchval("SELECT count(*) = 5 FROM deletions WHERE passes = 1"))

        await eventually(passed)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    assert await house.pool.fetchval("SELECT max(passes) FROM deletions") == 1
