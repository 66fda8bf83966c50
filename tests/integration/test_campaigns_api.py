"""`/v1/campaigns` on a real gateway and a real PostgreSQL: what services ask for, see, and are refused."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.postgres import Pool
from gateway.api.pages import cursor_after
from ops.dev.servers import NatsServer
from tests.integration.test_events_api import KEY, add_key
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually

pytestmark = pytest.mark.usefixtures("patient")

READER = "sk_test_9876543210"
CAMPAIGN: dict[str, Any] = {
    "id": "autumn",
    "audience": {"users": ["alice", "bob", "carol"]},
    "exclude": {"users": ["carol"]},
    "message": {"type": "sale.autumn", "data": {"off": 20}},
    "rate": 100,
}

BEYOND_THE_YEARS = ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-31T12:00:00")
"""Moments that lie outside the years 1 to 9999 in UTC, or nobody knows where."""


@asynccontextmanager
async def serving(nats: NatsServer, postgres: str) -> AsyncIterator[TestGateway]:
    await add_key(postgres, KEY, ["campaigns:write", "campaigns:read"])
    await add_key(postgres, READER, ["campaigns:read"], tenant="other")
    async with gateway_on(nats, postgres_url=postgres) as gateway:

        async def known() -> bool:
            return all([(await ask(gateway, "GET", "", key=key))[0] == 200 for key in (KEY, READER)])

        await eventually(known)
        yield gateway


async def ask(
    gateway: TestGateway, method: str, path: str, body: Any = None, *, key: str = KEY
) -> tuple[int, dict[str, Any]]:
    data = None if body is None else io.BytesIO(json.dumps(body).encode())
    url, headers = f"{gateway.url}/v1/campaigns{path}", {"Authorization": f"Bearer {key}"}
    async with gateway.http.request(method, url, data=data, headers=headers) as response:
        return response.status, await response.json(content_type=None)


async def test_a_service_starts_a_campaign_and_sees_holds_up_and_ends_it(
    nats_server: NatsServer, postgres: str, pool: Pool
) -> None:
    async with serving(nats_server, postgres) as gateway:
        tried = await ask(gateway, "POST", "/dry-run", CAMPAIGN)
        counted = {"audience": 3, "recipients": 2, "reasons": {"excluded": 1}}
        assert tried == (200, {**counted, "sample": 2, "decisions": {"inapp": {"now: default": 2}}})
        assert await pool.fetchval("SELECT count(*) FROM campaigns") == 0
        assert await ask(gateway, "POST", "", CAMPAIGN) == (202, {"id": "autumn", "created": True})
        assert await ask(gateway, "POST", "", CAMPAIGN) == (202, {"id": "autumn", "created": False})
        status, asked = await ask(gateway, "GET", "/autumn")
        assert (status, bool(asked.pop("start_at")), asked) == (200, True, CAMPAIGN)
        for change, state in (("pause", "paused"), ("resume", "running")):
            status, said = await ask(gateway, "POST", f"/autumn/{change}")
            assert (status, said["state"], said["rate"]) == (200, state, 100)
        assert (await ask(gateway, "PUT", "/autumn/rate", {"rate": 7}))[1]["rate"] == 7
        assert (await ask(gateway, "POST", "/autumn/cancel"))[1]["state"] == "cancelled"
        assert await gateway.broker.leader_last("KV_cancels", "$KV.cancels.acme.campaign=3Aautumn"), (
            "dispatchers hear of it"
        )
        assert (await ask(gateway, "GET", "/autumn/progress"))[1]["state"] == "cancelled"
        assert await ask(gateway, "GET", "/autumn/channels") == (200, {"channels": {}}), "nothing was dispatched"
        status, problem = await ask(gateway, "POST", "/autumn/resume")
        assert (status, problem["code"]) == (409, "campaign_conflict")


async def test_what_is_no_campaign_is_refused_with_the_member_and_nothing_is_stored(
    nats_server: NatsServer, postgres: str, pool: Pool
) -> None:
    async with serving(nats_server, postgres) as gateway:
        await ask(gateway, "POST", "", CAMPAIGN)
        for changed, status, code, field in (
            ({"rate": 101}, 409, "campaign_conflict", None),
            ({"id": "no blanks"}, 400, "invalid_body", "id"),
            ({"id": "b", "audience": {"topic": "a", "everyone": True}}, 400, "invalid_body", "audience"),
            ({"id": "b", "audience": {"users": ["topic:news"]}}, 400, "invalid_body", "audience.users[0]"),
            ({"id": "b", "message": {"type": "no blanks"}}, 400, "invalid_body", "message.subject"),
            ({"id": "b", "colour": "red"}, 400, "invalid_body", None),
            ({"id": "b", "rate": 0}, 400, "invalid_body", None),
            ({"id": "b", "not_after": "2026-01-01T00:00:00Z"}, 400, "invalid_body", "not_after"),
            *(
                ({"id": "b", name: at}, 400, "invalid_body", name)
                for name in ("start_at", "not_after")
                for at in BEYOND_THE_YEARS
            ),
            *(
                ({"id": "b", "message": {"type": "a.b", "expires_at": at}}, 400, "invalid_body", "message.expires_at")
                for at in BEYOND_THE_YEARS
            ),
        ):
            answered, problem = await ask(gateway, "POST", "", CAMPAIGN | changed)
            assert (answered, problem["code"]) == (status, code), (changed, problem)
            assert field is None or problem["field"] == field
            if any(at in str(changed) for at in BEYOND_THE_YEARS):
                assert "2026-01-31T12:00:00Z" in problem["detail"]
                tried, problem = await ask(gateway, "POST", "/dry-run", CAMPAIGN | changed)
                assert (tried, problem["field"]) == (400, field)
        assert await pool.fetchval("SELECT count(*) FROM campaigns") == 1
        status, problem = await ask(gateway, "POST", "/dry-run", CAMPAIGN | {"not_after": "2026-01-01T00:00:00Z"})
        assert (status, problem["field"]) == (400, "not_after")
        for path in ("/none", "/none/progress", "/none/channels"):
            assert (await ask(gateway, "GET", path))[1]["code"] == "not_found"
        assert (await ask(gateway, "POST", "/none/pause"))[1]["code"] == "not_found"


async def test_a_tenant_sees_and_changes_its_own_campaigns_only_and_as_far_as_its_key_allows(
    nats_server: NatsServer, postgres: str
) -> None:
    async with serving(nats_server, postgres) as gateway:
        await ask(gateway, "POST", "", CAMPAIGN)
        assert (await ask(gateway, "GET", "/autumn", key=READER))[0] == 404
        assert (await ask(gateway, "GET", "", key=READER))[1] == {"items": [], "next": None}
        for method, path, body in (("POST", "", CAMPAIGN), ("POST", "/autumn/cancel", None)):
            assert (await ask(gateway, method, path, body, key=READER))[0] == 403


async def test_a_list_of_campaigns_is_read_page_by_page_the_newest_first(
    nats_server: NatsServer, postgres: str, pool: Pool
) -> None:
    async with serving(nats_server, postgres) as gateway:
        for number in range(5):
            await ask(gateway, "POST", "", CAMPAIGN | {"id": f"c{number}"})
        await pool.execute("UPDATE campaigns SET created_at = '2026-01-01T00:00:00Z' WHERE id IN ('c1', 'c2')")
        seen, cursor = [], ""
        while cursor is not None:
            status, page = await ask(gateway, "GET", f"?limit=2{cursor and '&cursor=' + cursor.replace('+', '%2B')}")
            assert status == 200
            seen += [each["id"] for each in page["items"]]
            cursor = page["next"]
        assert seen == ["c4", "c3", "c0", "c2", "c1"]
        for wrong in ("x", "2026-01-01_c1", "2026-01-01T00:00:00Z_"):
            assert (await ask(gateway, "GET", f"?cursor={wrong}"))[1]["code"] == "invalid_query"
        for at in BEYOND_THE_YEARS:
            status, problem = await ask(gateway, "GET", f"?cursor={cursor_after((at, 'c1'))}")
            assert (status, problem["field"]) == (400, "cursor"), problem
        for at in ("0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59.999999+00:00"):
            assert (await ask(gateway, "GET", f"?cursor={cursor_after((at, 'c1'))}"))[0] == 200
