"""What a tenant says of its notifications, over HTTP: types, templates, defaults, suppressions, webhook endpoints."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from engine.directory.changes import changing
from engine.directory.changing import Directory
from engine.directory.rules import Rules
from engine.directory.templates import TemplateKey, put_template
from engine.directory.tenant_defaults import put_defaults
from engine.directory.users import UserFields, delete_user, put_user
from engine.plan.preferences import TenantDefaults
from ops.dev.servers import NatsServer
from tests.integration.test_events_api import add_key
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually

KEY, OTHER, READER = "sk_acme_0123456789", "sk_other_0123456789", "sk_reader_0123456789"
AREAS = ("config", "suppressions", "webhooks")


@pytest.fixture
async def gateway(patient: None, nats_server: NatsServer, postgres: str) -> AsyncIterator[TestGateway]:
    """A gateway, and keys of two tenants that allow everything here, and one that may only look."""
    for key, tenant in ((KEY, "acme"), (OTHER, "other")):
        await add_key(postgres, key, [f"{area}:{may}" for area in AREAS for may in ("read", "write")], tenant)
    await add_key(postgres, READER, [f"{area}:read" for area in AREAS])
    async with gateway_on(nats_server, postgres_url=postgres) as gateway:

        async def known() -> bool:
            return all([(await ask(gateway, "GET", "types", key=key))[0] == 200 for key in (KEY, OTHER, READER)])

        await eventually(known)
        yield gateway


async def ask(
    gateway: TestGateway, method: str, path: str, body: Any = None, *, key: str = KEY, **query: Any
) -> tuple[int, dict[str, Any]]:
    given: dict[str, Any] = {"params": {name: str(value) for name, value in query.items()}, "json": body}
    headers = {"Authorization": f"Bearer {key}"}
    async with gateway.http.request(method, f"{gateway.url}/v1/{path}", headers=headers, **given) as response:
        return response.status, await response.json(content_type=None)


async def done(gateway: TestGateway, method: str, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
    status, answer = await ask(gateway, method, path, body, **query)
    assert status in (200, 201), answer
    return answer


async def all_of(gateway: TestGateway, path: str, **query: Any) -> list[dict[str, Any]]:
    """Every page of a list, two items at a time."""
    found: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = await done(gateway, "GET", path, limit=2, **cursor, **query)
        assert len(page["items"]) <= 2
        found += page["items"]
        if page["next"] is None:
            return found
        cursor = {"cursor": page["next"]}


async def test_a_type_is_kept_as_it_was_put_and_changed_only_by_who_has_seen_it(gateway: TestGateway) -> None:
    rule = {
        "channels": {"push": {"unless_seen_seconds": 60}, "email": {"digest": {"every": "hour"}}},
        "category": "orders",
    }
    made = await done(gateway, "PUT", "types/order.*", rule, version=0)
    assert made == {"pattern": "order.*", **rule, "version": made["version"]}
    assert await done(gateway, "GET", "types/order.*") == made
    assert await done(gateway, "PUT", "types/order.*", rule) == made, "nothing has changed"
    status, problem = await ask(gateway, "PUT", "types/order.*", {}, version=0)
    assert (status, problem["code"], problem["field"]) == (409, "version_conflict", "version")
    assert f"version {made['version']}" in problem["detail"]
    changed = await done(gateway, "PUT", "types/order.*", {}, version=made["version"])
    assert changed["version"] > made["version"]
    status, problem = await ask(gateway, "DELETE", "types/order.*", version=made["version"])
    assert (status, problem["code"]) == (409, "version_conflict")
    assert await done(gateway, "DELETE", "types/order.*", version=changed["version"]) == {"deleted": True}
    assert await done(gateway, "DELETE", "types/order.*") == {"deleted": False}
    assert (await ask(gateway, "GET", "types/order.*"))[0] == 404


async def test_pages_show_each_type_once_in_order_although_others_come_meanwhile(gateway: TestGateway) -> None:
    patterns = ["*", "a", "a.*", "a.b", "b-c", "b.c_d"]
    for pattern in reversed(patterns):
        await done(gateway, "PUT", f"types/{pattern}", {})
    await done(gateway, "PUT", "types/x", {}, key=OTHER)
    assert [one["pattern"] for one in await all_of(gateway, "types")] == patterns
    first = await done(gateway, "GET", "types", limit=3)
    await done(gateway, "PUT", "types/a.a", {})
    rest = await done(gateway, "GET", "types", cursor=first["next"])
    assert [one["pattern"] for one in first["items"] + rest["items"]] == [*patterns[:3], "a.a", *patterns[3:]]


REFUSED: tuple[tuple[str, Any, str | None], ...] = (
    ("types/order..x", {}, "pattern"), ("types/order.*.x", {}, "pattern"), ("types/o%20x", {}, "pattern"),
    ("types/%00", {}, "pattern"),
    ("types/x", {"channels": {"fax": {}}}, None), ("types/x", {"unknown": 1}, "unknown"),
    ("types/x", {"channels": {"push": {"unless_seen_seconds": 0}}}, "unless_seen_seconds"),
    ("types/x", {"version": 3}, "version"),
    ("types/x", {"ttl_seconds": "1"}, "ttl_seconds"), ("tenant/defaults", {"version": 3}, "version"),
    ("tenant/defaults", {"quiet_hours": {"windows": [{"start": "25:00", "end": "07:00"}]}}, "start"),
    ("tenant/defaults", {"timezone": "Mars"}, "timezone"), ("tenant/defaults", {"timezone": "../../etc/passwd"}, "timezone"),
    ("tenant/defaults", {"locale": "xx_YY"}, "locale"), ("tenant/defaults", {"types": {"a..b": {"sms": "off"}}}, None),
    ("tenant/defaults", {"channels": {"inapp": "digest"}}, "channels.inapp"),
    ("templates/x/webhook/de", {"parts": {"body": "x"}}, "channel"),
    ("templates/x/inapp/de", {"parts": {"body": "x"}}, "channel"),
    ("templates/x/email/de", {"parts": {"subject": "B {{ order }}", "body": "x"}}, "parts"),
    ("templates/x/sms/german", {"parts": {"body": "x"}}, "locale"), ("templates/x/fax/de", {"parts": {"body": "x"}}, "channel"),
    ("templates/x/sms/de", {"parts": {"text": "x"}}, "parts"),
    ("templates/x/email/de", {"parts": {"subject": "a\nb", "body": "x"}}, "parts"),
)  # fmt: skip


async def test_what_cannot_be_kept_is_refused_with_the_field(gateway: TestGateway) -> None:
    for path, body, field in REFUSED:
        status, problem = await ask(gateway, "PUT", path, body)
        assert status == 400, problem
        assert field is None or field in problem["field"]
    assert await all_of(gateway, "types") == await all_of(gateway, "templates") == []


async def test_what_was_kept_before_it_was_refused_can_be_read_and_taken_away(gateway: TestGateway) -> None:
    assert gateway.context.directory is not None
    key = TemplateKey("order.*", "webhook", "de")
    async with changing(gateway.context.directory.pool, "acme") as change:
        await put_defaults(change, TenantDefaults(timezone="Mars", channels={"inapp": "digest"}))
        await put_template(change, key, {"body": "{{ order }}"})
    assert (await done(gateway, "GET", "tenant/defaults"))["timezone"] == "Mars"
    assert (await done(gateway, "GET", f"templates/{key}"))["parts"] == {"body": "{{ order }}"}
    assert [one["channel"] for one in await all_of(gateway, "templates")] == ["webhook"]
    for path in ("tenant/defaults", f"templates/{key}"):
        assert await done(gateway, "DELETE", path) == {"deleted": True}


async def test_templates_are_versions_of_which_one_is_active(gateway: TestGateway) -> None:
    path = "templates/order.shipped/email/de-AT"
    parts = {"subject": "Bestellung {{ data.order }}", "body": "*unterwegs*"}
    first = await done(gateway, "PUT", path, {"parts": parts}, version=0)
    assert (first["parts"], first["active"]) == (parts, True)
    second = await done(gateway, "PUT", path, {"parts": {**parts, "body": "weg"}}, version=first["version"])
    shown = await done(gateway, "GET", path)
    assert shown == {**second, "versions": [second["version"], first["version"]]}
    old = await done(gateway, "GET", path, version=first["version"])
    assert (old["parts"], old["active"]) == (parts, False)
    assert (await ask(gateway, "PUT", path, {"parts": parts}, version=first["version"]))[0] == 409
    back = await done(gateway, "PUT", f"{path}/active", {"version": first["version"]}, version=second["version"])
    assert (back["version"], back["active"]) == (first["version"], True)
    for status, version in ((404, 99), (400, 0)):
        assert (await ask(gateway, "PUT", f"{path}/active", {"version": version}))[0] == status
    for locale in ("default", "en"):
        await done(gateway, "PUT", f"templates/order.*/sms/{locale}", {"parts": {"body": "x"}})
    listed = await all_of(gateway, "templates")
    assert [(one["type"], one["channel"], one["locale"]) for one in listed] == [
        ("order.*", "sms", "default"), ("order.*", "sms", "en"), ("order.shipped", "email", "de-AT"),
    ]  # fmt: skip
    assert all("parts" not in one for one in listed)
    assert await done(gateway, "DELETE", path) == {"deleted": True}
    assert (await ask(gateway, "GET", path, version=first["version"]))[0] == 404


async def test_defaults_of_a_tenant_hold_everywhere_a_second_after_they_were_put(gateway: TestGateway) -> None:
    directory = gateway.context.directory
    assert directory is not None
    rules = Rules(directory.pool, gateway.broker)
    rules.start()
    try:
        assert await done(gateway, "GET", "tenant/defaults") == {}
        assert (await rules.of("acme")).defaults == TenantDefaults()
        made: dict[str, Any] = {"version": 0}
        for effect in ("off", "on", "off", "on", "off"):  # a machine that stands still for a while does not each time
            document = {"channels": {"sms": effect}, "timezone": "Europe/Vienna"}
            made = await done(gateway, "PUT", "tenant/defaults", document, version=made["version"])
            assert made == {**document, "version": made["version"]}

            async def known(wanted: Any = document["channels"]) -> bool:
                return (await rules.of("acme")).defaults.channels == wanted

            put_at = time.monotonic()
            await eventually(known)
            if (took := time.monotonic() - put_at) <= 1:
                break
        assert took <= 1
        assert await done(gateway, "GET", "tenant/defaults", key=OTHER) == {}
        assert (await ask(gateway, "PUT", "tenant/defaults", {}, version=0))[0] == 409
        assert await done(gateway, "DELETE", "tenant/defaults") == {"deleted": True}
        assert await done(gateway, "DELETE", "tenant/defaults") == {"deleted": False}
    finally:
        await rules.close()


ALICE = {"channel": "email", "address": "Wonder.Land@Example.com ", "reason": "hard_bounce"}


async def test_an_address_is_suppressed_in_whichever_way_it_is_written_until_that_ends(
    gateway: TestGateway, postgres: str
) -> None:
    new = [
        ALICE,
        {"channel": "sms", "address": "+4366412345678", "reason": "opted_out", "source": "STOP"},
        {**ALICE, "scope": "news", "reason": "complaint", "expires_at": "2036-01-31T12:00:00Z"},
        {**ALICE, "scope": "past", "expires_at": "2006-01-31T12:00:00Z"},
    ]
    ids = (await done(gateway, "POST", "suppressions", {"suppressions": new}))["ids"]
    assert len(set(ids)) == 4
    found = await done(
        gateway, "POST", "suppressions/search", {"channel": "email", "address": "wonder.land@EXAMPLE.com"}
    )
    assert [(one["id"], one["scope"], one["address"]) for one in found["items"]] == [
        (ids[0], "all", "wonder.land@example.com"),
        (ids[2], "news", "wonder.land@example.com"),
    ]
    assert {one["id"] for one in await all_of(gateway, "suppressions")} == set(ids[:3])
    assert [one["id"] for one in await all_of(gateway, "suppressions", channel="sms")] == [ids[1]]
    assert [one["id"] for one in await all_of(gateway, "suppressions", reason="complaint")] == [ids[2]]
    for key, deleted in ((OTHER, False), (KEY, True), (KEY, False)):
        assert await done(gateway, "DELETE", f"suppressions/{ids[0]}", key=key) == {"deleted": deleted}
    connection = await asyncpg.connect(postgres)
    try:
        assert await connection.fetchval("SELECT count(*) FROM suppressions") == 2, "what has ended is not kept"
    finally:
        await connection.close()


async def test_what_a_person_wanted_is_not_replaced_by_what_a_mailbox_did(gateway: TestGateway) -> None:
    async def reason() -> tuple[str, str | None]:
        [one] = await all_of(gateway, "suppressions")
        return one["reason"], one["expires_at"]

    bounce = {**ALICE, "reason": "soft_bounce", "expires_at": "2036-01-31T12:00:00Z"}
    complaint, opt_out = ({**ALICE, "reason": reason} for reason in ("complaint", "opted_out"))
    kept = ((bounce, "soft_bounce"), (complaint, "complaint"), (bounce, "complaint"), (opt_out, "opted_out"))
    for new, expected in (*kept, (bounce, "opted_out"), (complaint, "opted_out")):
        await done(gateway, "POST", "suppressions", {"suppressions": [new]})
        assert (await reason())[0] == expected
    assert await reason() == ("opted_out", None)


async def test_suppressions_that_a_provider_made_by_mistake_are_lifted_together_and_no_legal_opt_out_is(
    gateway: TestGateway,
) -> None:
    new = [{**ALICE, "address": f"a{number}@example.com", "source": "relay 550/5.1.1"} for number in range(3)]
    new += [{**ALICE, "address": "b@example.com", "source": "spare 550"}, {**ALICE, "reason": "opted_out"}]
    new += [{"channel": "sms", "address": "+4366412345678", "reason": "hard_bounce", "source": "relay"}]
    ids = (await done(gateway, "POST", "suppressions", {"suppressions": new}))["ids"]
    chosen = {"reason": "hard_bounce", "channel": "email", "source": "relay"}
    for wrong in ({}, {"reason": "opted_out"}, chosen | {"since": "2026-01-31T12:00:00"}, chosen | {"all": True}):
        assert (await ask(gateway, "POST", "suppressions/lift", wrong))[0] == 400, wrong
    assert (await ask(gateway, "POST", "suppressions/lift", chosen, key=READER))[0] == 403
    for key, more in ((OTHER, {}), (KEY, {"until": "2026-01-31T12:00:00Z"}), (KEY, {"since": "2036-01-31T12:00:00Z"})):
        said = await done(gateway, "POST", "suppressions/lift", chosen | more, key=key)
        assert said == {"lifted": 0, "more": False}
    assert await done(gateway, "POST", "suppressions/lift", chosen) == {"lifted": 3, "more": False}
    assert {one["id"] for one in await all_of(gateway, "suppressions")} == set(ids[3:])


NO_SUPPRESSIONS: tuple[dict[str, Any], ...] = (
    {"address": "wonder"}, {"address": "a b@example.com"}, {"channel": "sms"}, {"channel": "sms", "address": "066412345678"},
    {"reason": "Hard Bounce"}, {"expires_at": "2036-01-31T12:00:00"}, {"scope": "a\x00b"}, {"source": "a\nb"}, {"unknown": 1},
)  # fmt: skip


async def test_of_suppressions_all_are_kept_or_none_and_no_address_is_repeated(gateway: TestGateway) -> None:
    for wrong in NO_SUPPRESSIONS:
        with capture_logs() as lines:
            status, problem = await ask(gateway, "POST", "suppressions", {"suppressions": [ALICE, {**ALICE, **wrong}]})
        assert (status, problem["code"]) == (400, "invalid_body"), wrong
        assert "wonder" not in str(problem).lower() + str(lines).lower()
    assert await all_of(gateway, "suppressions") == []


async def test_postgresql_has_no_address_to_repeat_in_its_errors(gateway: TestGateway, postgres: str) -> None:
    await done(gateway, "POST", "suppressions", {"suppressions": [ALICE]})
    connection = await asyncpg.connect(postgres)
    try:
        with pytest.raises(asyncpg.UniqueViolationError) as violated:
            await connection.execute("INSERT INTO suppressions SELECT * FROM suppressions")
        assert "wonder" not in str(violated.value)
        named = await connection.fetch("SELECT indexdef FROM pg_indexes WHERE tablename = 'suppressions'")
        assert not any("address)" in row["indexdef"].replace("address_hash", "") for row in named)
    finally:
        await connection.close()


HOOK = {"url": "https://hooks.example.com/in", "types": ["order.*"]}


async def test_a_secret_is_told_once_and_replaced_without_a_gap(gateway: TestGateway, postgres: str) -> None:
    made = await done(gateway, "POST", "webhooks", HOOK)
    secret, path = made.pop("secret"), f"webhooks/{made['id']}"
    assert (made["url"], made["types"], made["state"], made["secrets"]) == (HOOK["url"], HOOK["types"], "active", 1)
    assert await done(gateway, "GET", path) == made
    rotated = await done(gateway, "POST", f"{path}/secret", {}, version=made["version"])
    assert (rotated["secrets"], rotated["secret"] != secret) == (2, True)
    assert (await ask(gateway, "POST", f"{path}/secret", {}, version=made["version"]))[0] == 409
    shown = [await done(gateway, "GET", path), await done(gateway, "GET", "webhooks")]
    assert not any(word in str(shown) for word in (secret, rotated["secret"], "whsec_"))
    connection = await asyncpg.connect(postgres)
    try:
        kept = await connection.fetchrow("SELECT secret, previous_secret FROM webhook_endpoints")
        assert tuple(kept) == (rotated["secret"], secret)
        retired = await done(gateway, "DELETE", f"{path}/secret/previous")
        assert retired["secrets"] == 1
        assert tuple(await connection.fetchrow("SELECT secret, previous_secret FROM webhook_endpoints")) == (
            rotated["secret"],
            None,
        )
    finally:
        await connection.close()
    own = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    assert (await done(gateway, "POST", f"{path}/secret", {"secret": own}))["secret"] == own


async def test_a_request_without_body_is_told_so_and_taken_where_no_member_is_needed(gateway: TestGateway) -> None:
    for method, path in (("PUT", "types/order.*"), ("PUT", "tenant/defaults"), ("POST", "webhooks")):
        status, problem = await ask(gateway, method, path)
        assert (status, problem["code"]) == (400, "invalid_body")
        assert "JSON object" in problem["detail"]
    assert (await ask(gateway, "GET", "types/order.*"))[0] == 404
    made = await done(gateway, "POST", "webhooks", HOOK)
    assert (await done(gateway, "POST", f"webhooks/{made['id']}/secret"))["secrets"] == 2


async def test_endpoints_belong_to_a_tenant_or_a_user_and_can_be_switched_off(
    gateway: TestGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = await done(gateway, "POST", "webhooks", HOOK)
    hers = await done(gateway, "POST", "webhooks", {**HOOK, "user": "alice"})
    assert {one["id"] for one in await all_of(gateway, "webhooks")} == {mine["id"], hers["id"]}
    assert [one["id"] for one in await all_of(gateway, "webhooks", user="alice")] == [hers["id"]]
    assert await all_of(gateway, "webhooks", key=OTHER) == []
    path = f"webhooks/{hers['id']}"
    for method, body in (("GET", None), ("PUT", HOOK), ("DELETE", None)):
        status, answer = await ask(gateway, method, path, body, key=OTHER)
        assert (status, answer) == (200, {"deleted": False}) if method == "DELETE" else status == 404
    off = await done(gateway, "PUT", path, {**HOOK, "state": "disabled"}, version=hers["version"])
    assert (off["state"], off["user"]) == ("disabled", "alice")
    monkeypatch.setattr("engine.directory.webhooks.WEBHOOKS_PER_USER", 1)
    status, problem = await ask(gateway, "POST", "webhooks", {**HOOK, "user": "alice"})
    assert (status, problem["code"]) == (409, "limit_reached")
    assert await done(gateway, "DELETE", path) == {"deleted": True}
    await done(gateway, "POST", "webhooks", {**HOOK, "user": "alice"})


NO_ENDPOINTS: tuple[dict[str, Any], ...] = (
    {"url": "https://169.254.169.254/latest"}, {"url": "http://hooks.example.com"}, {"types": []}, {"types": ["a..b"]},
    {"user": ""},
    {"user": "topic:news"}, {"secret": "whsec_hunter2"}, {"secret": "hunter2hunter2hunter2hunter2hunter2"}, {"state": "off"},
)  # fmt: skip


async def test_an_endpoint_that_cannot_be_is_refused_without_repeating_its_secret(gateway: TestGateway) -> None:
    for wrong in NO_ENDPOINTS:
        status, problem = await ask(gateway, "POST", "webhooks", {**HOOK, **wrong})
        assert (status, problem["code"]) == (400, "invalid_body"), wrong
        assert "hunter2" not in str(problem)
        assert next(iter(wrong)) in problem["field"]


CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("PUT", "types/x", {}), ("DELETE", "types/x", None), ("PUT", "templates/x/sms/de", {"parts": {"body": "x"}}),
    ("DELETE", "templates/x/sms/de", None), ("PUT", "tenant/defaults", {}), ("DELETE", "tenant/defaults", None),
    ("POST", "suppressions", {"suppressions": [ALICE]}), ("DELETE", f"suppressions/{'0' * 64}", None), ("POST", "webhooks", HOOK),
    ("DELETE", f"webhooks/wh_{'0' * 24}", None), ("POST", f"webhooks/wh_{'0' * 24}/secret", {}),
)  # fmt: skip


async def test_a_key_that_may_look_may_not_change(gateway: TestGateway) -> None:
    for method, path, body in CHANGES:
        status, problem = await ask(gateway, method, path, body, key=READER)
        assert (status, problem["code"]) == (403, "forbidden"), path


async def test_a_cursor_of_somebody_elses_making_does_no_harm(gateway: TestGateway) -> None:
    for path in ("types", "templates", "suppressions", "webhooks"):
        for cursor in ("", "x", "WyIiXQ", "WyJcdTAwMDAiXQ", "W10", "x" * 2000, "ä"):
            status, problem = await ask(gateway, "GET", path, cursor=cursor)
            refused = (status, problem.get("code"), problem.get("field")) == (400, "invalid_query", "cursor")
            assert status == 200 or refused, (path, cursor)


class Marks:
    """What caches of profiles would be told."""

    def __init__(self) -> None:
        self.pended: list[set[str]] = []
        self.settled_for: list[set[str]] = []

    async def pending(self, tenant: str, users: Sequence[str], seconds: float) -> str:
        assert tenant == "acme"
        self.pended.append(set(users))
        return "token"

    async def settled(self, tenant: str, users: Sequence[str], token: str) -> None:
        self.settled_for.append(set(users))


async def test_caches_hear_of_users_whose_profile_a_suppression_or_an_endpoint_changes(
    gateway: TestGateway, postgres: str
) -> None:
    directory = gateway.context.directory
    assert directory is not None
    connection = await asyncpg.connect(postgres)
    try:
        for tenant, user, fields in (
            ("acme", "ann", UserFields(email="Wonder.Land@example.com")),
            ("acme", "bob", UserFields(phone="+4366412345678")),
            ("acme", "cid", UserFields(email="other@example.com")),
            ("acme", "dan", UserFields(email="ÅSA.ström@example.com")),
            ("other", "ann", UserFields(email="wonder.land@example.com")),
        ):
            async with directory.changing(tenant, [user]) as change:
                await put_user(change, user, fields)

        async def told(method: str, path: str, body: Any = None) -> tuple[set[str], dict[str, Any]]:
            marks = Marks()
            gateway.context.directory = Directory(directory.pool, marks)
            answer = await done(gateway, method, path, body)
            assert marks.pended == marks.settled_for
            return set().union(*marks.pended), answer

        new = [ALICE, {"channel": "sms", "address": "+4366412345678", "reason": "opted_out"}]
        users, answer = await told("POST", "suppressions", {"suppressions": new})
        assert users == {"ann", "bob"}
        assert (await told("DELETE", f"suppressions/{answer['ids'][1]}"))[0] == {"bob"}
        asa = {**ALICE, "address": "åsa.STRÖM@example.com"}
        assert (await told("POST", "suppressions", {"suppressions": [asa]}))[0] == {"dan"}
        users, endpoint = await told("POST", "webhooks", {**HOOK, "user": "cid"})
        assert users == {"cid"}
        assert (await told("PUT", f"webhooks/{endpoint['id']}", {**HOOK, "state": "disabled"}))[0] == {"cid"}
        assert (await told("DELETE", f"webhooks/{endpoint['id']}"))[0] == {"cid"}
        assert (await told("POST", "webhooks", HOOK))[0] == set(), "everybody's: that is a rule"
        versions = await connection.fetch(
            "SELECT user_id, version FROM profiles WHERE tenant = 'acme' ORDER BY user_id"
        )
        assert [tuple(row) for row in versions] == [("ann", 2), ("bob", 3), ("cid", 4), ("dan", 2)]
    finally:
        gateway.context.directory = directory
        await connection.close()


async def test_a_deleted_user_gets_no_endpoint_and_loses_those_he_had(gateway: TestGateway, postgres: str) -> None:
    await done(gateway, "POST", "webhooks", {**HOOK, "user": "ann"})
    directory = gateway.context.directory
    assert directory is not None
    async with directory.changing("acme", ["ann"]) as change:
        await delete_user(change, "ann")
    assert await all_of(gateway, "webhooks") == []
    status, problem = await ask(gateway, "POST", "webhooks", {**HOOK, "user": "ann"})
    assert (status, problem["code"]) == (409, "user_deleted")
