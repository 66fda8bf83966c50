"""Dead letters as services see them over HTTP."""

from collections import Counter
from typing import Any
from urllib.parse import quote

from engine.channels.channel import Outcome
from engine.jobs.messages import decode_job
from gateway.api.pages import cursor_after
from ops.dev.servers import NatsServer, Valkey
from tests.integration.test_events_api import add_key
from tests.support.gateways import gateway_on
from tests.support.letters import World, dead, job
from tests.support.logs import eventually

KEYS = {"sk_test_1111111111": ["dead_letters:read", "dead_letters:write"], "sk_test_2222222222": ["dead_letters:read"]}


async def test_a_service_looks_through_replays_and_drops_what_is_its_tenants_over_http(
    world: World, nats_server: NatsServer, valkey: Valkey, postgres: str
) -> None:
    full, reader = KEYS
    for key, scopes in KEYS.items():
        await add_key(postgres, key, scopes)
    await dead(world, *(job(f"n{number}") for number in range(5)), job("foreign", tenant="other"))
    await dead(world, job("odd"), outcome=Outcome(kind="permanent", provider="relay", code="999", known=False))
    options: dict[str, Any] = {"postgres_url": postgres, "redis_url": valkey.url, "topology_ready": True}
    async with gateway_on(nats_server, **options) as gateway:

        async def ask(method: str, path: str, body: Any = None, key: str = full) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {key}"}
            url = f"{gateway.url}/v1/dead-letters{path}"
            async with gateway.http.request(method, url, json=body, headers=headers) as response:
                return response.status, await response.json()

        async def known() -> bool:
            return all([(await ask("GET", "", key=key))[0] == 200 for key in KEYS])

        await eventually(known)
        seen: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            _, page = await ask("GET", f"?limit=2{cursor and '&cursor=' + cursor}")
            seen += [one["id"] for one in page["items"]]
            cursor = page["next"]
        assert seen == ["n0", "n1", "n2", "n3", "n4", "odd"]
        _, said = await ask("GET", "/groups?channel=email")
        assert [(one["code"], one["known"], one["count"]) for one in said["groups"]] == [
            ("999", False, 1),
            ("550", True, 5),
        ]
        others = next(one.letter.seq for one in await world.letters() if one.letter.tenant == "other")
        assert (await ask("GET", f"/{others}"))[0] == 404
        assert (await ask("POST", "/drop", {"seqs": [others]}))[1] == {"fates": {"gone": 1}, "next": None}
        assert (await ask("POST", "/drop", {"code": "999"}, key=reader))[0] == 403
        assert (await ask("GET", "?tenant=other"))[0] == 403
        for unsaid in ({}, {"seqs": [others], "all": True}, {"seqs": [others], "class": "permanent"}):
            assert (await ask("POST", "/drop", unsaid))[0] == 400
        assert (await ask("GET", "?cursor=x"))[0] == 400
        assert (await ask("POST", "/drop", {"code": "999"}))[1]["fates"] == {"dropped": 1}
        first = (await ask("GET", "?limit=1"))[1]["items"][0]["seq"]
        _, whole = await ask("GET", f"/{first}")
        assert decode_job(whole["payload"].encode()).data == {"text": "the parcel for ann"}
        fates: Counter[str] = Counter()
        cursor = None
        while True:
            _, said = await ask(
                "POST", "/replay", {"class": "permanent", "limit": 2, "cursor": cursor, "per_second": 500}
            )
            fates += Counter(said["fates"])
            if (cursor := said["next"]) is None:
                break
        assert fates == {"replayed": 5}
        assert (await ask("GET", ""))[1]["items"] == []
    world.desk.outcome = Outcome(kind="ok")
    await world.work()
    assert sorted(world.desk.accepted.values()) == [1] * 5
    assert [one.letter.id for one in await world.letters()] == ["foreign"]


async def test_a_number_that_no_letter_can_have_is_refused_and_the_broker_is_not_blamed(
    world: World, nats_server: NatsServer, valkey: Valkey, postgres: str
) -> None:
    key = "sk_test_1111111111"
    await add_key(postgres, key, KEYS[key])
    options: dict[str, Any] = {"postgres_url": postgres, "redis_url": valkey.url, "topology_ready": True}
    async with gateway_on(nats_server, **options) as gateway:

        async def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
            url, headers = f"{gateway.url}/v1/dead-letters{path}", {"Authorization": f"Bearer {key}"}
            async with gateway.http.request(method, url, json=body, headers=headers) as response:
                return response.status, await response.json()

        async def known() -> bool:
            return (await ask("GET", ""))[0] == 200

        await eventually(known)
        for number in (2**63, 2**64 - 1, 2**64, 10**30, 0, -1):
            status, problem = await ask("GET", f"/{number}")
            assert (status, problem["code"], problem["field"]) == (400, "invalid_query", "seq"), number
            for act in ("replay", "drop"):
                status, problem = await ask("POST", f"/{act}", {"seqs": [1, number]})
                assert (status, problem["code"]) == (400, "invalid_body"), number
            cursor = cursor_after((str(number), "2026-01-31T12:00:00+00:00"))
            assert (await ask("GET", f"?cursor={cursor}"))[0] == (200 if number == 0 else 400)
        for at in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"):
            for name in ("since", "until"):
                status, problem = await ask("GET", f"?{name}={quote(at)}")
                assert (status, problem["code"], problem["field"]) == (400, "invalid_query", name), problem
                status, problem = await ask("POST", "/drop", {"channel": "push", name: at})
                assert (status, problem["code"], problem["field"]) == (400, "invalid_body", name), problem
            assert (await ask("GET", f"?cursor={cursor_after(('5', at))}"))[0] == 400
        assert (await ask("GET", "?until=2026-01-31T12:00:00"))[0] == 200, "without an offset it is in UTC"
        assert (await ask("GET", f"/{2**63 - 1}"))[0] == 404
        assert (await ask("POST", "/replay", {"seqs": [2**63 - 1]}))[1]["fates"] == {"gone": 1}
