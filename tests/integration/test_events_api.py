"""Events over HTTP, on a real nats-server and a real PostgreSQL."""

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from prometheus_client import REGISTRY

from engine.errors import ApiError
from gateway.limits import BULK_IN_FLIGHT, BULK_SECONDS
from ops.dev.servers import NatsServer
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually
from tests.support.tokens import token

KEY = "sk_test_0123456789"


@asynccontextmanager
async def with_keys(nats: NatsServer, postgres: str, **options: Any) -> AsyncIterator[TestGateway]:
    """A gateway that knows the API key `KEY` of tenant acme, and waits for PostgreSQL on a busy machine."""
    await add_key(postgres, KEY, ["events:write"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.access.api_keys.API_KEY_QUERY_SECONDS", 25.0)
        async with gateway_on(nats, postgres_url=postgres, **options) as gateway:
            assert (await post(gateway, b""))[0] != 503
            yield gateway


async def add_key(url: str, key: str, scopes: list[str], tenant: str = "acme") -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "INSERT INTO api_keys (key_hash, tenant, name, scopes) VALUES ($1, $3, 'test', $2)",
            hashlib.sha256(key.encode()).digest(),
            scopes,
            tenant,
        )
    finally:
        await connection.close()


async def post(
    gateway: TestGateway, body: Any, *, path: str = "/v1/events", key: str | None = KEY, **headers: str
) -> tuple[int, dict[str, Any]]:
    given = {**headers, **({"Authorization": f"Bearer {key}"} if key is not None else {})}
    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    async with gateway.http.post(gateway.url + path, data=data, headers=given) as response:
        answer: dict[str, Any] = await response.json(content_type=None)
        return response.status, answer


EVENT = {"id": "e1", "type": "order.shipped", "to": ["alice"], "data": {"order": 17}}


async def stored_event(gateway: TestGateway, seq: int) -> tuple[str, bytes, dict[str, str]]:
    message = (await gateway.broker.api("STREAM.MSG.GET.EVENTS", {"seq": seq}))["message"]
    lines = base64.b64decode(message.get("hdrs", "")).decode().split("\r\n")[1:]
    headers = dict(line.split(": ", 1) for line in lines if line)
    return message["subject"], base64.b64decode(message["data"]), headers


async def test_an_accepted_event_is_stored_and_again_it_is_a_duplicate(nats_server: NatsServer, postgres: str) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with with_keys(nats_server, postgres) as gateway:
        status, answer = await post(gateway, {**EVENT, "unknown": {"kept": [1]}}, traceparent=traceparent)
        assert (status, answer) == (202, {"event_id": "e1", "seq": 1, "duplicate": False})
        subject, body, headers = await stored_event(gateway, 1)
        assert subject.endswith(".acme.alice.order.shipped")
        assert json.loads(body) == {"id": "e1", "to": ["alice"], "data": {"order": 17}, "unknown": {"kept": [1]}}
        assert headers["traceparent"] == traceparent
        assert await post(gateway, EVENT) == (202, {"event_id": "e1", "seq": 1, "duplicate": True})


async def test_the_idempotency_key_names_an_event_without_an_id(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.idempotency.today", lambda: 20_000)  # no midnight in between
    anonymous = {name: value for name, value in EVENT.items() if name != "id"}
    async with with_keys(nats_server, postgres) as gateway:
        answers = [await post(gateway, anonymous, **{"Idempotency-Key": "order-17"}) for _ in range(2)]
        assert answers[0][1]["event_id"].startswith("order-17.")
        assert answers[1][1]["event_id"] == answers[0][1]["event_id"]
        assert [answer["duplicate"] for _, answer in answers] == [False, True]
        _, named = await post(gateway, EVENT, **{"Idempotency-Key": "other"})
        assert named["event_id"] == "e1"
        ids = {(await post(gateway, anonymous))[1]["event_id"] for _ in range(2)}
        assert len(ids) == 2


@pytest.mark.parametrize("key", ["a b", "x" * 129])
async def test_an_idempotency_key_that_can_be_no_id_stands_for_one_all_the_same(
    nats_server: NatsServer, postgres: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.idempotency.today", lambda: 20_000)  # no midnight in between
    anonymous = {name: value for name, value in EVENT.items() if name != "id"}
    async with with_keys(nats_server, postgres) as gateway:
        answers = [(await post(gateway, anonymous, **{"Idempotency-Key": key}))[1] for _ in range(2)]
        assert answers[0]["event_id"] == answers[1]["event_id"]
        assert [answer["duplicate"] for answer in answers] == [False, True]


async def test_unknown_members_are_kept_whatever_they_are_called(nats_server: NatsServer, postgres: str) -> None:
    unknown = {"key": "k", "payload": {"a": [1]}, "unknown": 1, "fields": None, "self": True, "kept": "x"}
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, {**EVENT, **unknown}))[0] == 202
        subject, body, _ = await stored_event(gateway, 1)
        assert subject.endswith(".acme.alice.order.shipped")
        assert unknown.items() <= json.loads(body).items()


async def test_an_event_of_another_tenant_cannot_pass_for_the_one_that_is_published(
    nats_server: NatsServer, postgres: str
) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        attack = b'{"id":"e1","to":["mallory"]}'
        await gateway.broker.append("events.evil.mallory.x", attack, msg_id="acme:e1")
        status, answer = await post(gateway, EVENT)
        assert (status, answer) == (202, {"event_id": "e1", "seq": 2, "duplicate": False})
        subject, body, _ = await stored_event(gateway, 2)
        assert subject.endswith(".acme.alice.order.shipped")
        assert json.loads(body)["data"] == EVENT["data"]
        await gateway.broker.append("events.evil.mallory.x", b"not json", msg_id="acme:e2")
        _, bulk = await post(gateway, {"events": [{**EVENT, "id": "e2"}]}, path="/v1/events/bulk")
        assert bulk["results"] == [{"event_id": "e2", "seq": 4, "duplicate": False}]


async def test_an_event_that_is_too_large_with_its_headers_is_not_called_a_full_store(
    nats_server: NatsServer, postgres: str
) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        config = (await gateway.broker.stream("EVENTS")).config
        await gateway.broker.api("STREAM.UPDATE.EVENTS", {**config, "max_msg_size": 1_000})
        status, problem = await post(gateway, {**EVENT, "data": "x" * 700}, tracestate="a=" + "x" * 400)
        assert (status, problem["type"]) == (413, "urn:seamark:problem:invalid_event")


async def test_a_trace_that_is_none_does_not_keep_an_event_from_being_stored(
    nats_server: NatsServer, postgres: str
) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        body = json.dumps(EVENT).encode()
        head = (
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n"
            b"traceparent: \xff\xe4\r\ntracestate: \xc3\xa4=1\r\n\r\n" % (KEY.encode(), len(body))
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        try:
            writer.write(head + body)
            async with asyncio.timeout(20):
                assert b" 202 " in await reader.readline()
        finally:
            writer.close()
            await writer.wait_closed()
        assert "traceparent" not in (await stored_event(gateway, 1))[2]


async def test_the_ordering_key_decides_the_subject(nats_server: NatsServer, postgres: str) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        await post(gateway, {**EVENT, "to": ["alice", "bob"], "ordering_key": "order/17"})
        assert ".acme.order=2F17.order.shipped" in (await stored_event(gateway, 1))[0]


INVALID: dict[str, tuple[Any, str | None]] = {
    "not json": (b"{", None),
    "not an object": ([EVENT], None),
    "no type": ({"to": ["alice"]}, "type"),
    "a type that is none": ({**EVENT, "type": "a b"}, "type"),
    "an impossible ordering key": ({**EVENT, "ordering_key": "k" * 129}, "ordering_key"),
    "nested too deeply to be read": (
        b'{"type":"x","to":["alice"],"data":%b' % (b"[" * 50_000 + b"]" * 50_000 + b"}"),
        None,
    ),
    "nobody": ({**EVENT, "to": []}, "to"),
    "recipients of another type": ({**EVENT, "to": "alice"}, "to"),
    "an impossible user": ({**EVENT, "to": [""]}, "to"),
    "an id with blanks": ({**EVENT, "id": "a b"}, "id"),
    "another tenant": ({**EVENT, "tenant": "other"}, "tenant"),
    "too much data": ({**EVENT, "data": "x" * 300_000}, "data"),
    "an unknown priority": ({**EVENT, "priority": "urgent!"}, "priority"),
    "a user whose name has a NUL": ({**EVENT, "to": ["nul\0user"]}, "to"),
    "one of many users whose name has a NUL": ({**EVENT, "to": ["alice", "nul\0user"]}, "to"),
    "an ordering key with a NUL": ({**EVENT, "ordering_key": "a\0b"}, "ordering_key"),
    "a transaction with a NUL": ({**EVENT, "transaction_id": "a\0b"}, "transaction_id"),
    "a category with a NUL": ({**EVENT, "category": "a\0b"}, "category"),
    "a collapse key with a NUL": ({**EVENT, "collapse_key": "a\0b"}, "collapse_key"),
    "a channel that there is not": ({**EVENT, "channels": ["inapp", "fax"]}, "channels"),
    "no channel": ({**EVENT, "channels": []}, "channels"),
    "an empty id": ({**EVENT, "id": ""}, "id"),
    "a time without offset": ({**EVENT, "time": "2026-01-01T00:00:00"}, "time"),
}


@pytest.mark.parametrize("case", INVALID)
async def test_an_invalid_event_is_refused_with_the_field_and_not_stored(
    nats_server: NatsServer, postgres: str, case: str
) -> None:
    body, field = INVALID[case]
    async with with_keys(nats_server, postgres) as gateway:
        status, problem = await post(gateway, body)
        assert (status, problem["type"]) == (400, "urn:seamark:problem:invalid_event")
        assert problem.get("field") == field or field is None
        assert problem["detail"]
        assert (await gateway.broker.stream("EVENTS")).messages == 0


async def test_only_a_known_key_with_the_scope_may_publish(nats_server: NatsServer, postgres: str) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        await add_key(postgres, "reader", ["events:read"])
        assert (await post(gateway, EVENT, key=None))[0] == 401
        assert (await post(gateway, EVENT, key="unknown"))[0] == 401
        assert (await post(gateway, EVENT, key=token()))[0] == 401
        assert (await post(gateway, EVENT, key="reader"))[0] == 403
        assert (await gateway.broker.stream("EVENTS")).messages == 0


async def test_a_revoked_key_ends_within_the_minute_it_is_believed(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_RENEW_SECONDS", 0.1)
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_SECONDS", 0.2)
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, EVENT))[0] == 202
        admin = await asyncpg.connect(postgres)
        try:
            await admin.execute("UPDATE api_keys SET revoked_at = now()")
        finally:
            await admin.close()

        async def refused() -> bool:
            return (await post(gateway, EVENT))[0] == 401

        await eventually(refused)


async def test_invalid_keys_of_one_address_are_looked_up_only_so_often_and_known_keys_go_on(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.server.API_KEY_GUESSES_PER_MINUTE", 3)
    await add_key(postgres, "unused", ["events:write"])
    async with with_keys(nats_server, postgres, trusted_proxies=("127.0.0.1",)) as gateway:
        attacker = {"X-Forwarded-For": "9.9.9.9, 203.0.113.7"}
        assert (await post(gateway, EVENT, **attacker))[0] == 202
        statuses = [(await post(gateway, EVENT, key=f"guess{number}", **attacker))[0] for number in range(5)]
        assert statuses == [401, 401, 401, 429, 429]
        assert (await post(gateway, EVENT, key="unused", **attacker))[0] == 429
        assert (await post(gateway, EVENT, **attacker))[0] == 202
        assert (await post(gateway, EVENT, key="unused", **{"X-Forwarded-For": "203.0.113.8"}))[0] == 202


def checked(how: str) -> float:
    """How often an API key was checked this way."""
    return REGISTRY.get_sample_value("seamark_gateway_api_keys_total", {"how": how}) or 0.0


async def test_while_postgresql_is_away_known_keys_go_on_and_others_get_503(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY_RENEW_SECONDS", "API_KEY_SECONDS", "API_KEY_RETRY_SECONDS"):  # the store is asked each time
        monkeypatch.setattr(f"gateway.access.api_keys.{name}", 0)
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, EVENT))[0] == 202
        admin = await asyncpg.connect(postgres)
        try:
            await admin.execute("ALTER TABLE api_keys RENAME TO gone")
            outlived = checked("outlived")
            assert (await post(gateway, EVENT))[0] == 202
            assert checked("outlived") == outlived + 1
            status, problem = await post(gateway, EVENT, key="another")
            assert (status, problem["type"]) == (503, "urn:seamark:problem:unavailable")
        finally:
            await admin.close()


async def test_a_full_store_is_said_and_nothing_is_accepted(nats_server: NatsServer, postgres: str) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        config = (await gateway.broker.stream("EVENTS")).config
        await gateway.broker.api("STREAM.UPDATE.EVENTS", {**config, "max_bytes": 2_000, "max_msg_size": 1_000})
        statuses = []
        for number in range(20):
            status, answer = await post(gateway, {**EVENT, "id": f"e{number}", "data": "x" * 200})
            statuses.append(status)
            if status != 202:
                break
        assert (statuses[0], statuses[-1], answer["type"]) == (202, 503, "urn:seamark:problem:store_full")
        assert (await gateway.broker.stream("EVENTS")).messages == len(statuses) - 1


async def test_without_a_broker_an_event_is_not_accepted(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, EVENT))[0] == 202
        nats_server.kill()
        with monkeypatch.context() as patch:
            patch.setattr("gateway.api.events.EVENT_BUDGET_SECONDS", 0.5)
            async with gateway.http.post(
                f"{gateway.url}/v1/events", json={**EVENT, "id": "e2"}, headers={"Authorization": f"Bearer {KEY}"}
            ) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
        await eventually(lambda: not gateway.context.broker.connected)
        async with gateway.http.get(f"{gateway.url}/readyz") as response:
            assert response.status == 503
        async with gateway.http.get(f"{gateway.url}/healthz") as response:
            assert response.status == 200
        nats_server.start()
        await eventually(lambda: gateway.context.broker.connected)
        assert (await post(gateway, {**EVENT, "id": "e3"}))[0] == 202


async def test_a_bulk_tells_of_each_event_and_keeps_the_order_of_a_key(nats_server: NatsServer, postgres: str) -> None:
    bodies: list[Any] = [{**EVENT, "id": f"e{number}", "to": [f"user{number % 3}"]} for number in range(90)]
    bodies[10] = {"type": "x"}
    async with with_keys(nats_server, postgres) as gateway:
        status, answer = await post(gateway, {"events": bodies}, path="/v1/events/bulk")
        assert status == 202
        results = answer["results"]
        assert results[10]["error"]["field"] == "to"
        assert [result.get("event_id") for result in results] == [f"e{n}" if n != 10 else None for n in range(90)]
        for user in range(3):
            seqs = [results[n]["seq"] for n in range(90) if n % 3 == user and n != 10]
            assert seqs == sorted(seqs)
        assert (await gateway.broker.stream("EVENTS")).messages == 89
        for body, expected in (
            (b"{}", 400),
            ([EVENT], 400),
            ({"events": [EVENT] * 1_001}, 400),
            (b'{"events":[%b]}' % (b"[" * 50_000 + b"]" * 50_000), 400),
            (b"x" * (4 << 20) + b"x", 413),
        ):
            assert (await post(gateway, body, path="/v1/events/bulk"))[0] == expected


async def test_after_an_event_that_was_not_stored_a_bulk_stores_none_of_its_key(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [{**EVENT, "id": f"e{number}", "to": [f"user{number % 2}"]} for number in range(8)]
    async with with_keys(nats_server, postgres) as gateway:
        append = gateway.context.broker.append

        async def full_for_one(subject: str, payload: bytes, *rest: Any, **options: Any) -> Any:
            if options.get("msg_id") == "acme:e2":
                raise ApiError(503, 10077, "maximum bytes exceeded")
            return await append(subject, payload, *rest, **options)

        monkeypatch.setattr(gateway.context.broker, "append", full_for_one)
        status, answer = await post(gateway, {"events": bodies}, path="/v1/events/bulk")
        assert status == 202
        failed = {result["event_id"]: result["error"]["status"] for result in answer["results"] if "error" in result}
        assert failed == {"e2": 503, "e4": 503, "e6": 503}
        assert (await gateway.broker.stream("EVENTS")).messages == 5


async def test_a_bulk_waits_for_one_election_and_not_once_for_each_key(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    async def no_leader(*rest: Any, **options: Any) -> Any:
        nonlocal tried
        tried += 1
        await asyncio.sleep(0.05)
        raise ApiError(503, 10008, "JetStream system temporarily unavailable")

    bodies = [{**EVENT, "id": f"e{number}", "to": [f"user{number}"]} for number in range(300)]
    async with with_keys(nats_server, postgres) as gateway:
        monkeypatch.setattr(gateway.context.broker, "append", no_leader)
        _, answer = await post(gateway, {"events": bodies}, path="/v1/events/bulk")
        assert {result["error"]["status"] for result in answer["results"]} == {503}
        assert tried == BULK_IN_FLIGHT


async def test_without_a_broker_a_bulk_is_answered_after_one_budget_and_not_one_for_each_event(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [{**EVENT, "id": f"e{number}", "to": [f"user{number % 2}"]} for number in range(400)]
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, EVENT))[0] == 202
        nats_server.kill()
        await eventually(lambda: not gateway.context.broker.connected)
        monkeypatch.setattr("gateway.api.events.EVENT_BUDGET_SECONDS", 0.5)
        async with asyncio.timeout(20):  # of two hundred budgets it would be a hundred seconds
            status, answer = await post(gateway, {"events": bodies}, path="/v1/events/bulk")
        assert status == 202
        assert [result["event_id"] for result in answer["results"]] == [body["id"] for body in bodies]
        assert {result["error"]["status"] for result in answer["results"]} == {503}


async def bulk_of(gateway: TestGateway, key: str, prefix: str, count: int = 64) -> tuple[int, dict[str, Any]]:
    bodies = [{**EVENT, "id": f"{prefix}{number}"} for number in range(count)]
    return await post(gateway, {"events": bodies}, path="/v1/events/bulk", key=key)


async def test_bulk_requests_of_one_tenant_hold_up_no_other_publisher(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.api.events.BULK_SECONDS", 80.0)
    async with with_keys(nats_server, postgres) as gateway:
        await add_key(postgres, "other", ["events:write"], tenant="other")
        append, held = gateway.context.broker.append, asyncio.Event()

        async def slow_for_acme(subject: str, *rest: Any, **options: Any) -> Any:
            if subject.startswith("events.acme.") and not options["msg_id"].startswith("acme:single"):
                await held.wait()
            return await append(subject, *rest, **options)

        monkeypatch.setattr(gateway.context.broker, "append", slow_for_acme)
        bulks = [asyncio.create_task(bulk_of(gateway, KEY, f"b{number}-"), name="bulk") for number in range(12)]
        # Four are beyond what one tenant may have under way; the eight others are held.
        await eventually(lambda: sum(task.done() for task in bulks) == 4)
        assert [task.result()[0] for task in bulks if task.done()] == [503] * 4
        waiting = [task for task in bulks if not task.done()]
        async with asyncio.timeout(20):
            assert (await post(gateway, {**EVENT, "id": "single"}))[0] == 202
            assert (await post(gateway, EVENT, key="other"))[0] == 202
            status, answer = await bulk_of(gateway, "other", "o")
        assert (status, ["error" in result for result in answer["results"]]) == (202, [False] * 64)
        held.set()
        for task in waiting:
            status, answer = await task
            assert (status, ["error" in result for result in answer["results"]]) == (202, [False] * 64)


async def test_a_bulk_is_answered_within_its_time_and_says_what_became_of_each_event(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[tuple[float, asyncio.Timeout]] = []

    def timeout(seconds: float) -> asyncio.Timeout:
        bounds.append((seconds, asyncio.timeout(seconds)))
        return bounds[-1][1]

    monkeypatch.setattr("gateway.api.events.asyncio", SimpleNamespace(**{**vars(asyncio), "timeout": timeout}))
    async with with_keys(nats_server, postgres) as gateway:
        append = gateway.context.broker.append

        async def stuck(subject: str, *rest: Any, **options: Any) -> Any:
            if options["msg_id"] == "acme:e3":
                [(seconds, bound)] = bounds
                assert seconds == BULK_SECONDS
                bound.reschedule(asyncio.get_running_loop().time())  # they are over, however fast this machine was
                await asyncio.sleep(60)
            return await append(subject, *rest, **options)

        monkeypatch.setattr(gateway.context.broker, "append", stuck)
        async with asyncio.timeout(20):
            status, answer = await bulk_of(gateway, KEY, "e", 6)
        codes = [result.get("error", {}).get("code") for result in answer["results"]]
        assert (status, codes) == (202, [None, None, None, "unanswered", "unavailable", "unavailable"])
        assert [result["event_id"] for result in answer["results"]] == [f"e{number}" for number in range(6)]
        assert (await gateway.broker.stream("EVENTS")).messages == 3


async def test_a_body_that_never_ends_is_given_up(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.bodies.REQUEST_BODY_SECONDS", 0.3)
    async with with_keys(nats_server, postgres) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = f"POST /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        async with asyncio.timeout(20):
            assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
