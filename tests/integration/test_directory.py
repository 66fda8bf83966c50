"""Users, push tokens and topics over HTTP, on a real PostgreSQL: who may do what, what is stored, and what a race leaves."""

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import msgspec
import pytest

from engine.directory import topics, users
from engine.directory.changing import CHANGES_PER_TENANT, Directory, UserDeleted
from engine.directory.push_tokens import (
    HeldElsewhere,
    NewToken,
    WebPushKeys,
    move_token,
    register_token,
    retire_token,
    tokens_of,
)
from engine.directory.users import InvalidUser, UserFields, UserPatch
from engine.errors import LimitReached, StoreUnavailable, VersionConflict
from engine.limits import PUSH_TOKENS_PER_USER
from engine.postgres import transaction
from gateway.access.principals import Scope
from ops.dev.servers import NatsServer
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually
from tests.support.tokens import token

KEYS = {
    "all": ("acme", list(Scope)),
    "other": ("other", list(Scope)),
    "reader": ("acme", [Scope.USERS_READ, Scope.DEVICES_READ, Scope.TOPICS_READ]),
}
APNS = {"platform": "apns", "token": "ab" * 32, "app": "com.example.shop"}


@pytest.fixture
async def house(patient: None, nats_server: NatsServer, postgres: str) -> AsyncIterator[TestGateway]:
    """A gateway with a directory, and keys of two tenants."""
    connection = await asyncpg.connect(postgres, timeout=20)
    for key, (tenant, scopes) in KEYS.items():
        await connection.execute(
            "INSERT INTO api_keys (key_hash, tenant, name, scopes) VALUES ($1, $2, 'test', $3)",
            hashlib.sha256(key.encode()).digest(),
            tenant,
            scopes,
        )
    await connection.close()
    async with gateway_on(nats_server, postgres_url=postgres) as gateway:

        async def connected() -> bool:
            return (await ask(gateway, "GET", "/v1/users"))[0] == 200

        await eventually(connected)
        yield gateway


async def ask(gateway: TestGateway, method: str, path: str, body: Any = None, key: str = "all") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    async with gateway.http.request(method, gateway.url + path, json=body, headers=headers) as response:
        return response.status, await response.json(content_type=None)


@asynccontextmanager
async def changing(pool: asyncpg.Pool, *ids: str) -> AsyncIterator[Any]:
    async with Directory(pool).changing("acme", ids) as change:
        yield change


async def test_a_user_is_made_changed_and_read_by_his_tenant_alone(house: TestGateway) -> None:
    fields = {"email": "Alice@EXAMPLE.com", "phone": "+4366412345678", "locale": "de-at", "timezone": "Europe/Vienna"}
    status, made = await ask(
        house, "PUT", "/v1/users/alice@example", {**fields, "attributes": {"plan": {"name": "pro"}}}
    )
    assert (status, made["id"], made["email"], made["locale"]) == (200, "alice@example", "Alice@example.com", "de-AT")
    assert (await ask(house, "PUT", "/v1/users/alice@example", {**fields, "attributes": {"plan": {"name": "pro"}}}))[
        1
    ] == made
    patch = {"phone": None, "attributes": {"plan": {"seats": 3}}}
    status, patched = await ask(house, "PATCH", "/v1/users/alice@example", patch)
    assert (status, patched["phone"], patched["attributes"]) == (200, None, {"plan": {"name": "pro", "seats": 3}})
    assert patched["version"] > made["version"]
    assert await ask(house, "GET", "/v1/users/alice@example") == (200, patched)
    assert (await ask(house, "GET", "/v1/users/alice@example", key="other"))[0] == 404
    assert (await ask(house, "PATCH", "/v1/users/nobody", patch))[0] == 404


async def test_a_change_for_an_old_version_is_refused_and_says_which_there_is(house: TestGateway) -> None:
    _, made = await ask(house, "PUT", "/v1/users/bob?version=0", {"locale": "en"})
    status, problem = await ask(house, "PUT", "/v1/users/bob?version=0", {"locale": "fr"})
    assert (status, problem["code"]) == (409, "version_conflict")
    assert f"version {made['version']}" in problem["detail"]
    answers = await asyncio.gather(
        *(ask(house, "PATCH", f"/v1/users/bob?version={made['version']}", {"attributes": {"n": n}}) for n in range(10))
    )
    assert sorted(status for status, _ in answers) == [200] + [409] * 9, "of all that saw a version one may change it"


WRONG_FIELDS: tuple[dict[str, Any], ...] = (
    {"email": "nobody"}, {"phone": "0664 1234"}, {"locale": "de_AT"}, {"timezone": "Vienna"},
    {"attributes": {"a": "x" * 9000}}, {"mail": "a@example.com"},
)  # fmt: skip


async def test_a_wrong_field_is_named_and_nothing_is_stored(house: TestGateway) -> None:
    assert (await ask(house, "PUT", "/v1/users/carol", {}))[0] == 200
    for body in WRONG_FIELDS:
        for method in ("PUT", "PATCH"):
            status, problem = await ask(house, method, "/v1/users/carol", body)
            assert (status, problem["code"], problem["field"]) == (400, "invalid_body", next(iter(body)))
    _, carol = await ask(house, "GET", "/v1/users/carol")
    assert (carol["email"], carol["attributes"]) == (None, {})


async def test_pages_hold_every_user_once_while_others_come_and_go(house: TestGateway, pool: asyncpg.Pool) -> None:
    await pool.execute(
        "INSERT INTO users (tenant, user_id, version)"
        " SELECT 'acme', 'u' || lpad(n::text, 3, '0'), 1 FROM generate_series(0, 119) n"
    )
    found: list[str] = []
    path = "/v1/users?limit=50"
    while True:
        _, page = await ask(house, "GET", path)
        found += [user["id"] for user in page["items"]]
        if page["next"] is None:
            break
        await pool.execute("INSERT INTO users (tenant, user_id, version) VALUES ('acme', $1, 1)", f"a{len(found)}")
        await pool.execute("DELETE FROM users WHERE user_id = $1", found[-1])
        path = f"/v1/users?limit=50&cursor={page['next']}"
    assert found == [f"u{number:03}" for number in range(120)]
    status, problem = await ask(house, "GET", "/v1/users?cursor=nonsense")
    assert (status, problem["field"]) == (400, "cursor")


async def test_a_key_may_do_what_its_scopes_say(house: TestGateway) -> None:
    assert (await ask(house, "GET", "/v1/users", key="reader"))[0] == 200
    for method, path, body in (
        ("PUT", "/v1/users/alice", {}),
        ("PATCH", "/v1/users/alice", {}),
        ("DELETE", "/v1/users/alice", None),
        ("PUT", "/v1/users/alice/devices/phone", APNS),
        ("DELETE", "/v1/users/alice/devices/phone", None),
        ("PUT", "/v1/topics/news/members", {"users": ["alice"]}),
        ("DELETE", "/v1/topics/news", None),
    ):
        status, problem = await ask(house, method, path, body, key="reader")
        assert (status, problem["code"]) == (403, "forbidden"), path
    assert (await ask(house, "GET", "/v1/users", key=token()))[0] in (401, 403), "a user's token lists nobody"
    assert (await ask(house, "GET", "/v1/devices"))[0] in (401, 403), "a service has no devices of its own"


async def test_a_token_moves_to_whoever_registers_it_last(house: TestGateway) -> None:
    alice, bob = token("alice", "acme"), token("bob", "acme")
    status, stored = await ask(house, "PUT", "/v1/devices/phone", {**APNS, "device": "phone"}, key=alice)
    assert (status, stored["id"], stored["device"]) == (200, "phone", "phone")
    assert "token" not in stored, "whoever has the token can send to the device"
    same = {**APNS, "token": APNS["token"].upper()}
    assert (await ask(house, "PUT", "/v1/devices/my-phone", same, key=bob))[0] == 200
    assert (await ask(house, "GET", "/v1/devices", key=alice))[1] == {"items": []}
    assert [one["id"] for one in (await ask(house, "GET", "/v1/users/bob/devices"))[1]["items"]] == ["my-phone"]
    assert (await ask(house, "PUT", "/v1/users/alice/devices/phone", APNS, key="other"))[0] == 200
    assert len((await ask(house, "GET", "/v1/devices", key=bob))[1]["items"]) == 1, "another tenant's token is another"
    assert (await ask(house, "DELETE", "/v1/devices/my-phone", key=bob))[1] == {"removed": True}
    assert (await ask(house, "DELETE", "/v1/users/bob/devices/my-phone"))[1] == {"removed": False}


async def test_tokens_that_move_among_users_while_some_are_deleted_have_one_owner_each(
    pool: asyncpg.Pool, postgres: str
) -> None:
    """Registrations and deletions in any order: each is done or refused, none waits for ever, no deleted user has a token."""
    tokens = [NewToken(platform="fcm", app="shop", token=f"t{n}") for n in range(3)]
    chance = random.Random(11)

    async def register(directory: Directory, user: str, new: NewToken) -> None:
        owner: str | None = None
        for _ in range(200):
            try:
                async with directory.changing("acme", {user, owner or user}, 60.0) as change:
                    await register_token(change, user, f"id-{chance.randrange(2)}", new)
                return
            except HeldElsewhere as error:
                owner = error.user
            except UserDeleted:
                return
        raise AssertionError("others were always faster")

    async def delete(directory: Directory, user: str) -> None:
        async with directory.changing("acme", [user], 60.0) as change:
            await users.delete_user(change, user)

    async with asyncpg.create_pool(postgres, min_size=0, max_size=6) as many:
        directory = Directory(many)
        work = [register(directory, f"u{chance.randrange(6)}", chance.choice(tokens)) for _ in range(60)]
        work += [delete(directory, f"u{n}") for n in range(3)]
        chance.shuffle(work)
        async with asyncio.timeout(60):
            await asyncio.gather(*work)
    rows = await pool.fetch("SELECT user_id, token_hash FROM push_tokens")
    assert len({row["token_hash"] for row in rows}) == len(rows) >= 1
    assert {row["user_id"] for row in rows} <= {"u3", "u4", "u5"}
    assert await pool.fetchval("SELECT count(*) FROM profiles WHERE deleted_at IS NOT NULL") == 3


async def test_whoever_waits_for_users_of_one_tenant_leaves_connections_to_others(
    pool: asyncpg.Pool, postgres: str
) -> None:
    """An import holds users of a tenant for up to a minute: their changes wait, other tenants' go on."""
    async with pool.acquire() as holder, asyncpg.create_pool(postgres, min_size=0, max_size=8) as small:
        await holder.execute("BEGIN")
        await holder.execute("INSERT INTO profiles (tenant, user_id) VALUES ('acme', 'held')")
        directory = Directory(small)

        async def touch(tenant: str, user: str) -> None:
            async with directory.changing(tenant, [user], 60.0) as mine:
                await users.put_user(mine, user, UserFields(locale="de"))

        waiting = [asyncio.create_task(touch("acme", "held")) for _ in range(40)]
        await eventually(lambda: small.get_size() - small.get_idle_size() >= CHANGES_PER_TENANT)
        await asyncio.gather(*(touch("other", f"u{n}") for n in range(10)))
        assert not any(task.done() for task in waiting)
        await holder.execute("COMMIT")
        await asyncio.gather(*waiting)


async def test_a_change_waits_for_its_turn_within_its_deadline(postgres: str) -> None:
    async with asyncpg.create_pool(postgres, min_size=0, max_size=8) as pool, AsyncExitStack() as held:
        directory = Directory(pool)
        for number in range(CHANGES_PER_TENANT):
            await held.enter_async_context(directory.changing("acme", [f"u{number}"]))
        with pytest.raises(StoreUnavailable, match="too many changes"):
            async with directory.changing("acme", ["alice"], 0.05):
                raise AssertionError("there is no place")
        await held.aclose()
        async with directory.changing("acme", ["alice"]) as change:
            await users.put_user(change, "alice", UserFields())


async def test_numbers_and_truths_are_kept_as_they_were_said(house: TestGateway) -> None:
    """To Python 1 is true, and PostgreSQL writes 1e300 with 301 digits: neither may decide what a segment finds."""
    values = (1, True, 1.5, 0, False, "1", [True], [1], {"a": True}, {"a": 1}, 9007199254740993, 1e-9)
    for number, value in enumerate(values):
        method = ("PUT", "PATCH")[number % 2]
        status, stored = await ask(house, method, "/v1/users/alice", {"attributes": {"n": value}})
        assert (status, json.dumps(stored["attributes"])) == (200, json.dumps({"n": value}))
        assert (await ask(house, method, "/v1/users/alice", {"attributes": {"n": value}}))[1] == stored
    for method in ("PUT", "PATCH"):
        for value in (1e300, 10**40, [[1e-300]]):
            status, problem = await ask(house, method, "/v1/users/alice", {"attributes": {"n": value}})
            assert (status, problem["field"]) == (400, "attributes")
    _, page = await ask(house, "GET", "/v1/users")
    assert [user["attributes"] for user in page["items"]] == [{"n": values[-1]}]


async def test_a_patch_mends_what_is_no_longer_valid(house: TestGateway, pool: asyncpg.Pool) -> None:
    """Zones leave the database of zones; a user who lives in one must stay changeable."""
    await ask(house, "PUT", "/v1/users/alice", {"email": "alice@example.com"})
    await pool.execute("UPDATE users SET timezone = 'Europe/Atlantis'")
    status, problem = await ask(house, "PATCH", "/v1/users/alice", {"locale": "de"})
    assert (status, problem["field"]) == (400, "timezone")
    status, mended = await ask(house, "PATCH", "/v1/users/alice", {"timezone": "Europe/Vienna"})
    assert (status, mended["timezone"], mended["email"]) == (200, "Europe/Vienna", "alice@example.com")
    await pool.execute("UPDATE users SET timezone = 'Europe/Atlantis'")
    assert (await ask(house, "PUT", "/v1/users/alice", {}))[0] == 200


async def test_a_patch_that_cannot_be_leaves_no_mark_and_costs_no_connection(pool: asyncpg.Pool, postgres: str) -> None:
    class Marks:
        left = 0

        async def pending(self, tenant: str, ids: Any, seconds: float) -> str:
            self.left += 1
            return ""

        async def settled(self, tenant: str, ids: Any, token: str) -> None:
            self.left -= 1

    marks = Marks()
    async with asyncpg.create_pool(postgres, min_size=0, max_size=1) as one:
        directory = Directory(one, marks)
        pids = set()
        for _ in range(3):
            async with directory.changing("acme", ["alice"]) as change:
                await users.put_user(change, "alice", UserFields())
                pids.add(await change.connection.fetchval("SELECT pg_backend_pid()"))
            with pytest.raises(InvalidUser, match="`email`"):
                async with directory.changing("acme", ["alice"]) as change:
                    await users.patch_user(change, "alice", UserPatch(email="nobody"))
    assert (len(pids), marks.left) == (1, 0)


async def test_a_token_that_many_register_at_once_has_one_owner(house: TestGateway, pool: asyncpg.Pool) -> None:
    answers = await asyncio.gather(*(ask(house, "PUT", f"/v1/users/user{n % 4}/devices/d{n}", APNS) for n in range(16)))
    assert {status for status, _ in answers} <= {200, 503}
    assert [status for status, _ in answers].count(200) >= 4
    assert await pool.fetchval("SELECT count(*) FROM push_tokens WHERE tenant = 'acme'") == 1


WRONG_TOKENS: tuple[tuple[dict[str, Any], str], ...] = (
    ({**APNS, "token": "xyz"}, "token"),
    ({**APNS, "token": ""}, "token"),
    ({**APNS, "keys": {"p256dh": "x", "auth": "y"}}, "keys"),
    ({"platform": "webpush", "app": "site", "token": "https://push.example/1"}, "keys"),
    ({"platform": "webpush", "app": "site", "token": "http://push.example/1", "keys": {"p256dh": "x", "auth": "y"}}, "token"),
    ({"platform": "webpush", "app": "site", "token": "https://push.example/1", "keys": {"p256dh": "AAAA", "auth": "AA"}},
     "keys.p256dh"),
    ({"platform": "sms", "token": "x", "app": "a"}, "platform"),
)  # fmt: skip


async def test_a_token_that_its_platform_would_not_know_is_refused(house: TestGateway) -> None:
    for body, field in WRONG_TOKENS:
        status, problem = await ask(house, "PUT", "/v1/devices/phone", body, key=token("alice", "acme"))
        assert (status, problem["code"], problem["field"]) == (400, "invalid_body", field)


async def test_the_oldest_token_makes_room_and_a_retired_one_first(pool: asyncpg.Pool) -> None:
    browser = WebPushKeys(p256dh="BA" + "A" * 85, auth="A" * 22)
    for number in range(PUSH_TOKENS_PER_USER):
        new = NewToken(platform="webpush", app="site", token=f"https://push.example/{number}", keys=browser)
        async with changing(pool, "alice") as change:
            await register_token(change, "alice", f"t{number}", new)
        if number == 3:
            retired = new.hash
    long_ago = await pool.fetchval("SELECT now() - interval '1 hour'")
    async with changing(pool, "alice") as change:
        assert not await retire_token(change, "alice", retired, "gone", long_ago), "it was registered since"
        assert await retire_token(change, "alice", retired, "gone")
        assert not await retire_token(change, "alice", retired, "gone"), "once"
    for name, expected in (("new", "t3"), ("newer", "t0")):
        before = {one.id for one in await tokens_of(pool, "acme", "alice")}
        async with changing(pool, "alice") as change:
            await register_token(change, "alice", name, NewToken(platform="fcm", app="shop", token=name))
        assert before - {one.id for one in await tokens_of(pool, "acme", "alice")} == {expected}


async def test_a_token_found_in_the_other_environment_is_stored_there_and_a_retired_one_stays_as_it_is(
    pool: asyncpg.Pool,
) -> None:
    new = NewToken(platform="apns", app="com.example.shop", token="ab" * 32)
    async with changing(pool, "alice") as change:
        await register_token(change, "alice", "phone", new)
        assert await move_token(change, "alice", new.hash, "sandbox")
        assert not await move_token(change, "alice", new.hash, "sandbox"), "it is there already"
        assert not await move_token(change, "bob", new.hash, "production"), "it is not his"
        (stored,) = await tokens_of(change.connection, "acme", "alice")
        assert (stored.environment, stored.retired_at) == ("sandbox", None)
        assert await retire_token(change, "alice", new.hash, "gone")
        assert not await move_token(change, "alice", new.hash, "production")


async def test_members_are_counted_whatever_is_asked_twice_or_at_once(house: TestGateway) -> None:
    async def put(*names: str) -> int:
        status, answer = await ask(house, "PUT", "/v1/topics/news.sport/members", {"users": list(names)})
        assert status == 200, answer
        count: int = answer["members"]
        return count

    assert await put("alice", "bob", "alice") == 2
    assert await put("bob", "carol") == 3
    await asyncio.gather(*(put(*(f"u{n}" for n in range(start, start + 20))) for start in range(0, 50, 10)))
    _, topic = await ask(house, "GET", "/v1/topics/news.sport")
    assert topic["members"] == 63
    status, answer = await ask(house, "DELETE", "/v1/topics/news.sport/members", {"users": ["alice", "nobody"]})
    assert (status, answer) == (200, {"members": 62})
    found, path = [], "/v1/topics/news.sport/members?limit=25"
    while path:
        _, page = await ask(house, "GET", path)
        found += [member["id"] for member in page["items"]]
        path = page["next"] and f"/v1/topics/news.sport/members?limit=25&cursor={page['next']}"
    assert found == sorted(["bob", "carol", *(f"u{n}" for n in range(60))])
    assert (await ask(house, "GET", "/v1/topics", key="other"))[1]["items"] == []
    assert (await ask(house, "DELETE", "/v1/topics/news.sport"))[1] == {"members": 0}
    assert (await ask(house, "GET", "/v1/topics/news.sport"))[0] == 404


async def test_a_topic_and_its_names_have_bounds(
    house: TestGateway, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topics, "TOPIC_MEMBERS_MAX", 3)
    with pytest.raises(LimitReached, match="3 members"):
        async with transaction(pool) as connection:
            await topics.add_members(connection, "acme", "full", ["a", "b", "c", "d"])
    monkeypatch.setattr(topics, "TOPICS_MAX", 1)
    async with transaction(pool) as connection:
        await topics.add_members(connection, "acme", "one", ["a"])
    with pytest.raises(LimitReached, match="1 topics"):
        async with transaction(pool) as connection:
            await topics.add_members(connection, "acme", "two", ["a"])
    monkeypatch.setattr(topics, "DELETED_AT_ONCE", 1)
    async with transaction(pool) as connection:
        await topics.add_members(connection, "acme", "one", ["b", "c"])
    lefts = []
    for _ in range(3):
        async with transaction(pool) as connection:
            lefts.append(await topics.delete_some(connection, "acme", "one"))
    assert lefts == [2, 1, 0]
    for body, field in (({"users": ["a", "topic:x"]}, "users[1]"), ({"users": []}, "users")):
        status, problem = await ask(house, "PUT", "/v1/topics/news/members", body)
        assert (status, problem["field"]) == (400, field)
    assert (await ask(house, "PUT", "/v1/topics/no name/members", {"users": ["a"]}))[0] == 400


async def test_nothing_but_making_him_anew_brings_a_deleted_user_back(house: TestGateway, pool: asyncpg.Pool) -> None:
    await ask(house, "PUT", "/v1/users/alice", {"email": "alice@example.com"})
    await ask(house, "PUT", "/v1/users/alice/devices/phone", APNS)
    await ask(house, "PUT", "/v1/topics/news/members", {"users": ["alice", "bob"]})
    _, before = await ask(house, "GET", "/v1/users/alice")
    assert (await ask(house, "DELETE", f"/v1/users/alice?version={before['version'] + 99}"))[0] == 409
    status, deleted = await ask(house, "DELETE", "/v1/users/alice")
    assert (status, deleted["id"]) == (202, "alice")
    assert (await ask(house, "DELETE", "/v1/users/alice"))[1] == deleted, "again is the same deletion"
    assert (await ask(house, "GET", "/v1/users/alice"))[0] == 404
    assert (await ask(house, "GET", "/v1/users/alice/devices"))[1] == {"items": []}
    assert (await ask(house, "GET", "/v1/topics/news"))[1]["members"] == 1
    # His app still has a valid token; an old list still has his name.
    status, problem = await ask(house, "PUT", "/v1/devices/phone", APNS, key=token("alice", "acme"))
    assert (status, problem["code"]) == (409, "user_deleted")
    assert (await ask(house, "PUT", "/v1/topics/news/members", {"users": ["alice"]}))[1] == {"members": 1}
    status, problem = await ask(house, "PUT", "/v1/users/alice", {})
    assert (status, problem["code"]) == (409, "user_deleted"), "while he is being erased"
    await pool.execute("UPDATE deletions SET erased_at = now()")
    status, anew = await ask(house, "PUT", "/v1/users/alice", {})
    assert (status, anew["email"]) == (200, None)
    assert anew["version"] > before["version"], "a version never comes again"
    assert await pool.fetchval("SELECT count(*) FROM deletions") == 0


async def test_a_change_that_meets_a_deletion_comes_before_it_or_is_refused(pool: asyncpg.Pool) -> None:
    """Whoever holds the user's row of `profiles` first is first: no change made meanwhile survives the deletion."""
    for order in range(10):
        name = f"user{order}"
        async with changing(pool, name) as change:
            await users.put_user(change, name, UserFields(locale="de"))

        async def register(name: str = name) -> str:
            try:
                async with changing(pool, name) as change:
                    await register_token(change, name, "phone", NewToken(platform="fcm", app="shop", token=name))
            except UserDeleted:
                return "refused"
            return "stored"

        async def delete(name: str = name) -> None:
            async with changing(pool, name) as change:
                await users.delete_user(change, name)

        await asyncio.gather(*((register(), delete()) if order % 2 else (delete(), register())))
        assert await pool.fetchval("SELECT count(*) FROM push_tokens WHERE user_id = $1", name) == 0
        assert await pool.fetchval("SELECT count(*) FROM users WHERE user_id = $1", name) == 0
        assert await pool.fetchval("SELECT deleted_at IS NOT NULL FROM profiles WHERE user_id = $1", name)


async def test_caches_hear_before_and_after_and_nothing_changes_unheard(pool: asyncpg.Pool) -> None:
    heard: list[Any] = []

    class Marks:
        away = False

        async def pending(self, tenant: str, ids: Any, seconds: float) -> str:
            if self.away:
                raise StoreUnavailable("Redis")
            heard.append(("pending", list(ids), await pool.fetchval("SELECT count(*) FROM users")))
            return f"change {len(heard)}"

        async def settled(self, tenant: str, ids: Any, token: str) -> None:
            heard.append((token, list(ids), await pool.fetchval("SELECT count(*) FROM users")))

    marks = Marks()
    directory = Directory(pool, marks)
    async with directory.changing("acme", ["bob", "alice", "bob"]) as change:
        await users.put_user(change, "alice", UserFields(locale="de"))
    assert heard == [("pending", ["alice", "bob"], 0), ("change 1", ["alice", "bob"], 1)]
    with pytest.raises(VersionConflict):
        async with directory.changing("acme", ["alice"]) as change:
            await users.put_user(change, "alice", UserFields(locale="fr"), expected=7)
    assert heard[2:] == [("pending", ["alice"], 1), ("change 3", ["alice"], 1)], "a conflict leaves no mark"
    with pytest.raises(StoreUnavailable):
        async with directory.changing("acme", ["alice"]):
            raise StoreUnavailable("the answer of the commit was lost")
    assert heard[4:] == [("pending", ["alice"], 1)], (
        "of what may have been stored the mark stays until it ends by itself"
    )
    marks.away = True
    with pytest.raises(StoreUnavailable):
        async with directory.changing("acme", ["carol"]):
            raise AssertionError("the block must not run")
    assert await pool.fetchval("SELECT version FROM profiles WHERE user_id = 'alice'") == 1


async def test_a_recipient_brings_what_is_known_of_him_and_the_event_keeps_the_id(
    house: TestGateway, pool: asyncpg.Pool
) -> None:
    known = {"id": "alice", "email": "alice@example.com", "locale": "de-AT"}
    event = {"type": "order.shipped", "to": ["bob", known], "data": {"n": 1}, "ordering_key": "o1", "note": {"kept": 1}}
    assert (await ask(house, "POST", "/v1/events", event))[0] == 202
    stored = await house.broker.leader_last("EVENTS", "ev.*.acme.o1.order.shipped")
    assert stored is not None
    assert msgspec.json.decode(stored.payload)["to"] == ["bob", "alice"]
    assert msgspec.json.decode(stored.payload)["note"] == {"kept": 1}
    _, alice = await ask(house, "GET", "/v1/users/alice")
    assert (alice["email"], alice["locale"]) == ("alice@example.com", "de-AT")
    assert (await ask(house, "GET", "/v1/users/bob"))[0] == 404, "an id alone makes no entry"
    await ask(house, "PATCH", "/v1/users/alice", {"phone": "+4366412345678"})
    to: tuple[dict[str, Any], ...] = {"id": "alice", "locale": None}, {"id": "carol", "email": "x"}, {"id": "carol"}
    bulk = {"events": [{**event, "to": [to[0]]}, {**event, "to": [to[1]]}, {**event, "to": [to[2]], "type": "no type"}]}
    status, answer = await ask(house, "POST", "/v1/events/bulk", bulk)
    assert status == 202
    assert answer["results"][0]["seq"]
    assert [result["error"]["field"] for result in answer["results"][1:]] == ["to", "type"]
    _, alice = await ask(house, "GET", "/v1/users/alice")
    assert (alice["locale"], alice["phone"]) == (None, "+4366412345678")
    assert (await ask(house, "GET", "/v1/users/carol"))[0] == 404


WRONG_RECIPIENTS: tuple[tuple[list[dict[str, Any]], str], ...] = (
    ([{"email": "a@example.com"}], "to[0]"),
    ([{"id": "alice", "email": "nobody"}], "to"),
    ([{"id": "alice", "attributes": {}}], "to[0]"),
    ([{"id": "topic:x"}], "to"),
    ([{"id": f"u{n}"} for n in range(101)], "to"),
)


async def test_a_wrong_recipient_is_told_and_neither_event_nor_user_is_stored(
    house: TestGateway, pool: asyncpg.Pool
) -> None:
    for to, field in WRONG_RECIPIENTS:
        status, problem = await ask(house, "POST", "/v1/events", {"type": "order.shipped", "to": to})
        assert (status, problem["code"]) == (400, "invalid_event")
        assert problem["field"].startswith(field)
        assert "nobody" not in problem["detail"]
    assert (await house.broker.stream("EVENTS")).last_seq == 0
    assert await pool.fetchval("SELECT count(*) FROM users") == 0


async def test_recipients_are_stored_only_for_keys_that_may_write_users(house: TestGateway, pool: asyncpg.Pool) -> None:
    await pool.execute("UPDATE api_keys SET scopes = ARRAY['events:write'] WHERE tenant = 'other'")
    event = {"type": "order.shipped", "to": [{"id": "alice", "email": "alice@example.com"}]}
    status, problem = await ask(house, "POST", "/v1/events", event, key="other")
    assert (status, problem["field"]) == (403, "to")
    assert (await ask(house, "POST", "/v1/events", {**event, "to": ["alice"]}, key="other"))[0] == 202
    async with changing(pool, "alice") as change:
        await users.delete_user(change, "alice")
    status, problem = await ask(house, "POST", "/v1/events", event)
    assert (status, problem["code"]) == (409, "user_deleted"), "an event does not bring him back while he is erased"
