"""Preferences and explanations over HTTP, on a real PostgreSQL and a real Valkey: who may, what holds, since when."""

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from engine.cancels import cancel
from engine.plan.decide import plan
from engine.plan.decisions import Inputs
from ops.dev.servers import NatsServer, Valkey
from tests.integration.test_directory_api import KEY, done
from tests.integration.test_directory_api import ask as ask_with_key
from tests.integration.test_events_api import add_key
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually
from tests.support.tokens import token

SCOPES = ["users:read", "users:write", "config:write", "config:read", "suppressions:write", "notifications:read"]
EVENT = {"to": ["alice"], "type": "order.shipped"}


@pytest.fixture
async def gateway(
    nats_server: NatsServer, postgres: str, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TestGateway]:
    # However slow the machine is: without a word of Redis nothing may be changed, and marks stay for a minute.
    monkeypatch.setattr("engine.profiles.cache.REDIS_SECONDS", 20.0)
    await add_key(postgres, KEY, SCOPES, "acme")
    async with gateway_on(nats_server, postgres_url=postgres, redis_url=valkey.url) as gateway:

        async def known() -> bool:
            return (await ask(gateway, "GET", "types", key=KEY))[0] == 200

        await eventually(known)
        rule = {"category": "orders", "channels": {"email": {}, "push": {"default": "off"}}}
        await done(gateway, "PUT", "types/order.*", rule)
        await done(gateway, "PUT", "templates/order.shipped/email/en", {"parts": {"subject": "x", "body": "y"}})
        await done(gateway, "PUT", "users/alice", {"email": "alice@example.com", "locale": "de"})
        yield gateway


async def ask(
    gateway: TestGateway, method: str, path: str, body: Any = None, *, key: str = "", **query: Any
) -> tuple[int, dict[str, Any]]:
    """As the user alice, unless there is a key."""
    return await ask_with_key(gateway, method, path, body, key=key or token("alice", "acme"), **query)


async def patched(gateway: TestGateway, patch: dict[str, Any], **query: Any) -> dict[str, Any]:
    status, answer = await ask(gateway, "PATCH", "preferences", patch, **query)
    assert status == 200, answer
    return answer


async def explained(gateway: TestGateway, event: dict[str, Any] | None = None, **body: Any) -> dict[str, Any]:
    return await done(gateway, "POST", "explain", {"event": EVENT if event is None else event, **body})


async def test_what_holds_for_each_type_and_channel_says_where_it_comes_from(gateway: TestGateway) -> None:
    status, before = await ask(gateway, "GET", "preferences")
    assert (status, before["document"], before["version"]) == (200, {}, 0)
    assert before["locale"] == {"value": "de", "source": "directory"}
    assert before["types"] == [
        {
            "type": "order.*",
            "category": "orders",
            "channels": {
                "inapp": {"choice": "on", "source": "always"},
                "email": {"choice": "on", "source": "rule"},
                "push": {"choice": "off", "source": "rule"},
            },
        }
    ]
    night = {"windows": [{"start": "22:00", "end": "07:00"}]}
    await done(gateway, "PUT", "tenant/defaults", {"quiet_hours": night, "categories": {"orders": {"email": "digest"}}})
    patch = {"types": {"order.*": {"push": "on"}}, "timezone": "Europe/Vienna", "locale": "de-AT"}
    after = await patched(gateway, patch, version=0)
    assert after["document"] == patch
    assert after["timezone"] == {"value": "Europe/Vienna", "source": "user"}

    async def told() -> bool:  # the rules of the tenant are held by the process, and changed a moment ago
        [held] = (await ask(gateway, "GET", "preferences"))[1]["types"]
        return bool(held["channels"]["email"] == {"choice": "digest", "source": "tenant_category"})

    await eventually(told)
    _, after = await ask(gateway, "GET", "preferences")
    assert after["quiet_hours"] == {"value": night, "source": "tenant"}
    [held] = after["types"]
    assert held["channels"]["push"] == {"choice": "on", "source": "user_type"}


async def test_a_patch_changes_what_it_names_and_only_of_the_version_it_was_made_for(gateway: TestGateway) -> None:
    first = await patched(gateway, {"channels": {"email": "off", "push": "on"}, "categories": {"offers": {"*": "off"}}})
    second = await patched(
        gateway, {"channels": {"push": None}, "categories": {"offers": None}}, version=first["version"]
    )
    assert second["document"] == {"channels": {"email": "off"}}
    assert second["version"] > first["version"]
    assert await patched(gateway, {"channels": {"email": "off"}}) == second, "nothing was changed"
    status, problem = await ask(gateway, "PATCH", "preferences", {"channels": {}}, version=first["version"])
    assert (status, problem["code"]) == (409, "version_conflict")
    status, of_service = await ask(gateway, "GET", "users/alice/preferences", key=KEY)
    assert (status, of_service) == (200, second)
    status, other = await ask(gateway, "PATCH", "users/bob/preferences", {"quiet_hours": {}}, key=KEY)
    assert (status, other["quiet_hours"]) == (200, {"value": {}, "source": "user"}), (
        "who is in no directory may wish, too"
    )


async def test_of_patches_at_the_same_time_each_counts_and_of_one_version_one_wins(gateway: TestGateway) -> None:
    await asyncio.gather(*(patched(gateway, {"types": {f"a.{n}": {"push": "off"}}}) for n in range(6)))
    held = (await ask(gateway, "GET", "preferences"))[1]
    assert len(held["document"]["types"]) == 6
    version = held["version"]
    ends = await asyncio.gather(
        *(ask(gateway, "PATCH", "preferences", {"locale": f"de-{at}"}, version=version) for at in ("AT", "CH", "DE"))
    )
    assert sorted(status for status, _ in ends) == [200, 409, 409]


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"channels": {"fax": "on"}}, "fax"),
        ({"channels": {"push": True}}, "channels"),
        ({"channels": {"inapp": "digest"}}, "channels.inapp"),
        ({"types": {"order.*": {"inapp": "instant"}}}, "types.order.*.inapp"),
        ({"types": {"order..x": {"push": "on"}}}, None),
        ({"timezone": "Mars/Phobos"}, None),
        ({"locale": "?"}, None),
        ({"quiet_hours": {"windows": [{"start": "24:00", "end": "07:00"}]}}, "start"),
        ({"quiet_hours": {"windows": [{"start": "22:00", "end": "07:00"}] * 15}}, "windows"),
        ({"sound": "off"}, "sound"),
        ({"channels": {"push": functools.reduce(lambda inner, _: {"x": inner}, range(400), {})}}, "channels"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_is_no_document_is_refused_whole_and_leaves_no_mark(
    gateway: TestGateway, valkey: Valkey, patch: dict[str, Any], field: str | None
) -> None:
    status, problem = await ask(gateway, "PATCH", "preferences", {**patch, "categories": {"orders": {"push": "on"}}})
    assert (status, problem["code"]) == (400, "invalid_body"), problem
    assert field is None or field in problem.get("field", "") + problem["detail"]
    assert "GET /openapi.json" in problem["detail"]
    assert (await ask(gateway, "GET", "preferences"))[1]["document"] == {}
    async with Redis.from_url(valkey.url) as redis:
        marked = [key for key in await redis.keys("profile:*") if any(b"mark:" in f for f in await redis.hkeys(key))]
    assert marked == [], "whoever sends nonsense is not read from the primary for a minute because of it"


async def test_the_app_is_switched_off_where_the_rule_makes_it_optional_and_is_shown_so(gateway: TestGateway) -> None:
    await done(gateway, "PUT", "types/offers", {"inapp": "optional"})
    await patched(gateway, {"channels": {"inapp": "off"}})

    async def told() -> bool:
        types = {one["type"]: one for one in (await ask(gateway, "GET", "preferences"))[1]["types"]}
        return "offers" in types and bool(types["offers"]["channels"]["inapp"]["choice"] == "off")

    await eventually(told)
    [offers, orders] = (await ask(gateway, "GET", "preferences"))[1]["types"]
    assert offers["channels"]["inapp"] == {"choice": "off", "source": "user_channel"}
    assert orders["channels"]["inapp"] == {"choice": "on", "source": "always"}


async def test_a_choice_that_was_kept_before_it_was_refused_keeps_nobody_from_another_change(
    gateway: TestGateway, postgres: str
) -> None:
    await patched(gateway, {"channels": {"inapp": "on"}})
    connection = await asyncpg.connect(postgres)
    try:
        await connection.execute("""UPDATE preferences SET document = '{"channels": {"inapp": "digest"}}'""")
    finally:
        await connection.close()
    held = await patched(gateway, {"channels": {"email": "off"}})
    assert held["document"] == {"channels": {"inapp": "digest", "email": "off"}}
    assert (await ask(gateway, "PATCH", "preferences", {"channels": {"inapp": "instant"}}))[0] == 400


async def test_a_document_has_a_bound(gateway: TestGateway) -> None:
    status, problem = await ask(
        gateway, "PATCH", "preferences", {"types": {f"a.{'x' * 60}{n}": {"push": "off"} for n in range(120)}}
    )
    assert (status, problem["code"]) == (409, "limit_reached")


async def test_only_the_user_and_services_with_the_scope_may(gateway: TestGateway, postgres: str) -> None:
    await add_key(postgres, "sk_reader_0123456789", ["users:read"], "acme")
    await add_key(postgres, "sk_other_0123456789", SCOPES, "other")
    await patched(gateway, {"channels": {"email": "off"}})

    async def refused() -> bool:
        return (await ask(gateway, "PATCH", "users/alice/preferences", {}, key="sk_reader_0123456789"))[0] == 403

    await eventually(refused)
    assert (await ask(gateway, "GET", "users/alice/preferences"))[0] in (401, 403), "a token is no key"
    status, held = await ask(gateway, "GET", "users/alice/preferences", key="sk_other_0123456789")
    assert (status, held["document"]) == (200, {}), "another tenant's alice"
    assert (await ask(gateway, "POST", "explain", {"event": EVENT}, key="sk_reader_0123456789"))[0] == 403


async def test_a_change_holds_for_the_very_next_decision_and_the_explanation_replays(gateway: TestGateway) -> None:
    for choice, email in (("off", {"when": "never", "why": "user_off"}), ("on", {"when": "now", "why": "user_on"})) * 3:
        await patched(gateway, {"channels": {"email": choice}})
        found = await explained(gateway)
        assert found["plan"]["email"] == email
        inputs = msgspec.convert(found["inputs"], Inputs)
        assert {name: [one.when, one.why] for name, one in plan(inputs).items()} == {
            name: [one["when"], one["why"]] for name, one in found["plan"].items()
        }
    assert "alice@example.com" not in str(found)
    assert found["plan"]["push"] == {"when": "never", "why": "default"}


async def test_an_explanation_says_when_it_is_decided_again(gateway: TestGateway) -> None:
    await patched(gateway, {"channels": {"email": "digest"}})
    email = (await explained(gateway))["plan"]["email"]
    assert email["when"].startswith("digest:orders/")
    assert email["again_as"] == "digest"
    assert email["again_at"] >= email["when"].partition("/")[2]


async def test_an_explanation_knows_which_transactions_are_cancelled(gateway: TestGateway) -> None:
    event = {**EVENT, "transaction_id": "order 17"}
    assert (await explained(gateway, event))["plan"]["email"]["why"] == "default"
    await cancel(gateway.broker, "acme", "order 17", budget_seconds=30)
    email = {"when": "never", "why": "cancelled"}

    async def told() -> bool:
        return bool((await explained(gateway, event))["plan"]["email"] == email)

    await eventually(told)


@pytest.mark.parametrize(
    "event", [{"priority": "low"}, {"to": [{"id": "alice", "email": "new@example.com"}]}, {"ordering_key": "order 17"}]
)
async def test_an_event_is_explained_whichever_way_it_would_go(gateway: TestGateway, event: dict[str, Any]) -> None:
    found = await explained(gateway, {**EVENT, **event})
    assert found["plan"]["email"] == {"when": "now", "why": "default"}
    about = found["inputs"]["notification"]
    assert (about["tenant"], about["user"], about["type"]) == ("acme", "alice", "order.shipped")


async def test_explaining_stores_and_sends_nothing(gateway: TestGateway) -> None:
    before = [(await gateway.broker.stream(name)).last_seq for name in ("EVENTS", "LOG-0", "RECEIPTS")]
    await explained(gateway, {**EVENT, "priority": "critical"})
    assert [(await gateway.broker.stream(name)).last_seq for name in ("EVENTS", "LOG-0", "RECEIPTS")] == before


async def test_an_event_that_would_be_refused_is_refused_and_a_user_must_be_one_of_its_own(
    gateway: TestGateway,
) -> None:
    for body, code in (
        ({"event": {"to": [], "type": "x"}}, "invalid_event"),
        ({"event": EVENT, "user": "bob"}, "invalid_body"),
        ({"event": {**EVENT, "to": ["alice", "bob"]}}, "invalid_body"),
    ):
        status, problem = await ask(gateway, "POST", "explain", body, key=KEY)
        assert (status, problem["code"]) == (400, code)
    assert "email" in (await explained(gateway, {**EVENT, "to": ["alice", "bob"]}, user="bob"))["plan"]


async def test_who_was_deleted_has_no_preferences_and_gets_nothing(gateway: TestGateway, postgres: str) -> None:
    await patched(gateway, {"channels": {"email": "on"}})
    assert (await ask(gateway, "DELETE", "users/alice", key=KEY))[0] == 202
    assert {one["why"] for one in (await explained(gateway))["plan"].values()} == {"user_deleted"}
    assert (await ask(gateway, "GET", "preferences"))[1]["code"] == "user_deleted"
    assert (await ask(gateway, "PATCH", "preferences", {"locale": "de"}))[1]["code"] == "user_deleted"
    connection = await asyncpg.connect(postgres)
    assert await connection.fetchval("SELECT count(*) FROM preferences") == 0
    await connection.close()


async def test_without_redis_nothing_is_changed_unheard_and_decisions_are_still_right(
    gateway: TestGateway, valkey: Valkey
) -> None:
    await explained(gateway)
    valkey.kill()
    status, problem = await ask(gateway, "PATCH", "preferences", {"channels": {"email": "off"}})
    assert (status, problem["code"]) == (503, "unavailable")
    assert (await explained(gateway))["plan"]["email"] == {"when": "now", "why": "default"}
    valkey.start()

    async def changed() -> bool:
        return (await ask(gateway, "PATCH", "preferences", {"channels": {"email": "off"}}))[0] == 200

    await eventually(changed)
    assert (await explained(gateway))["plan"]["email"] == {"when": "never", "why": "user_off"}


async def test_a_name_that_cannot_be_is_refused_and_not_taken_for_a_database_that_is_away(gateway: TestGateway) -> None:
    for body in ({"event": {**EVENT, "to": ["nul\0user"]}, "user": "nul\0user"}, {"event": EVENT, "user": "nul\0user"}):
        status, problem = await ask(gateway, "POST", "explain", body, key=KEY)
        assert status == 400, problem
