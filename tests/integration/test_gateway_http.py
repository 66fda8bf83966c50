"""Server-sent events, long polls and events over HTTP, on a real nats-server and a real PostgreSQL."""

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import asyncpg
import pytest
from structlog.testing import capture_logs

from engine.errors import ApiError
from gateway.limits import BULK_IN_FLIGHT
from gateway.port import State
from seamark.dev.servers import NatsServer
from seamark.migrate import migrate
from tests.support.gateways import QUICK, TestGateway, eventually, gateway_on, token


def bearer(**options: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(**options)}"}


# --- server-sent events ---------------------------------------------------------------------------------------------


class Stream:
    """A reader of server-sent events without any cleverness."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.comments = 0

    async def next(self, timeout: float = 5.0) -> tuple[str | None, str, dict[str, Any]]:
        """Id, event name and data of the next event."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(timeout):
            while True:
                raw = await self.response.content.readline()
                assert raw, "the stream has ended"
                line = raw.decode().rstrip("\n")
                if line.startswith(":"):
                    self.comments += 1
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif fields:
                    return fields.get("id"), fields.get("event", "message"), json.loads(fields["data"])

    async def until(self, op: str) -> tuple[str | None, dict[str, Any]]:
        while True:
            id, _, frame = await self.next()
            if frame.get("op") == op:
                return id, frame


@asynccontextmanager
async def stream(gateway: TestGateway, cursor: str | None = "start", **headers: str) -> AsyncIterator[Stream]:
    given = {**bearer(), **headers}
    if cursor is not None:
        given["Last-Event-ID"] = cursor
    async with gateway.http.get(f"{gateway.url}/v1/stream", params={"device": "tab"}, headers=given) as response:
        assert response.status == 200, await response.text()
        yield Stream(response)


async def test_a_stream_carries_the_same_frames_with_the_cursor_as_event_id(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(body=b'{"id":"r",\n"data":\r\n{"text":"two\\nlines"}}')
        async with stream(gateway) as events:
            assert events.response.content_type == "text/event-stream"
            assert (await events.next())[2]["op"] == "ready"
            id, frame = await events.until("record")
            assert id == frame["cursor"]
            assert frame["record"]["data"]["text"] == "two\nlines"
            await events.until("live")
            await gateway.append(count=2)
            cursors = [(await events.until("record"))[0] for _ in range(2)]
        missed = await gateway.append(count=300)
        async with stream(gateway, cursors[-1]) as events:
            assert [(await events.until("record"))[1]["seq"] for _ in range(300)] == missed
        await eventually(lambda: not len(gateway.context.sessions))


async def test_a_stream_shows_life_and_says_why_it_ends(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server, times=QUICK) as gateway:
        short = {"Authorization": f"Bearer {token(seconds=1.5)}"}
        async with stream(gateway, **short) as events:
            await events.until("live")
            while True:
                _, name, data = await events.next()
                if name == "close":
                    break
            assert (data["code"], data["name"]) == (4401, "unauthenticated")
            assert events.comments >= 2
            assert await events.response.content.read() == b""
        await eventually(lambda: not len(gateway.context.sessions))


async def raw(gateway: TestGateway, request: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request written by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = f"{request}\r\nHost: x\r\nAuthorization: Bearer {token()}\r\n\r\n"
    writer.write(head.encode())
    return reader, writer


async def test_a_stream_through_a_proxy_of_http_1_0_holds_nothing_but_events(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=2)
        reader, writer = await raw(gateway, "GET /v1/stream?device=tab&cursor=start HTTP/1.0")
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            text = await reader.readuntil(b'"op":"live"')
        assert b"chunked" not in head.lower()
        assert {line.partition(b":")[0] for line in text.split(b"\n") if line} == {b"id", b"data"}
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: not len(gateway.context.sessions))


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/records"])
async def test_a_head_request_opens_no_session(nats_server: NatsServer, path: str) -> None:
    async with gateway_on(nats_server) as gateway:
        reader, writer = await raw(gateway, f"HEAD {path}?device=tab&cursor=start HTTP/1.1")
        async with asyncio.timeout(5):
            assert b" 405 " in await reader.readline()
        assert not len(gateway.context.sessions)
        writer.close()
        await writer.wait_closed()


async def test_a_refusal_in_the_log_names_no_notification(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        url = f"{gateway.url}/v1/notifications/reset-of-alice@example.com/trace"
        with capture_logs() as lines:
            async with gateway.http.get(url, headers={"Authorization": "Bearer x"}) as response:
                assert response.status == 401
            async with gateway.http.get(url, headers={"Origin": "https://evil.example"}) as response:
                assert response.status == 403
    assert [line["event"] for line in lines] == ["token_refused", "handshake_refused"]
    assert "alice" not in str(lines)


@pytest.mark.parametrize(("path", "headers", "status"), [
    ("/v1/stream?device=d", {}, 401),
    ("/v1/stream?device=d", {"Authorization": "Bearer x.y.z"}, 401),
    ("/v1/stream?device=d", {"Authorization": "Basic abc"}, 401),
    ("/v1/stream", bearer(), 400),
    ("/v1/stream?device=", bearer(), 400),
    ("/v1/stream?device=d", {**bearer(), "Origin": "https://evil.example"}, 403),
    ("/v1/records?device=d&limit=x", bearer(), 400),
    ("/v1/records?device=d&limit=0", bearer(), 400),
    ("/v1/records?device=d&wait=-1", bearer(), 400),
    ("/v1/records?device=d&wait=nan", bearer(), 400),
    ("/v1/records?device=d", {}, 401),
    ("/v1/nothing", {}, 404),
    ("/v1/ws", {}, 400),
])  # fmt: skip
async def test_a_request_that_cannot_be_served_gets_a_problem(
    nats_server: NatsServer, path: str, headers: dict[str, str], status: int
) -> None:
    async with gateway_on(nats_server) as gateway:
        async with gateway.http.get(gateway.url + path, headers=headers) as response:
            assert response.status == status
            assert response.content_type == "application/problem+json"
            problem = await response.json()
        assert problem["status"] == status
        assert set(problem) <= {"type", "title", "status", "detail", "field"}
        assert not len(gateway.context.sessions)


async def test_a_listed_page_of_another_origin_may_ask_and_is_told_so(nats_server: NatsServer) -> None:
    page = {"Origin": "https://app.example"}
    async with gateway_on(nats_server, origins=("https://app.example",)) as gateway:
        async with gateway.http.options(f"{gateway.url}/v1/stream", headers=page) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
        async with stream(gateway, **page) as events:
            assert events.response.headers["Access-Control-Allow-Origin"] == "https://app.example"
        evil = {"Origin": "https://evil.example"}
        async with gateway.http.options(f"{gateway.url}/v1/stream", headers=evil) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers


# --- polling --------------------------------------------------------------------------------------------------------


async def poll(gateway: TestGateway, cursor: str | None = "start", **query: Any) -> dict[str, Any]:
    params = {"device": "watch", **{name: str(value) for name, value in query.items()}}
    if cursor is not None:
        params["cursor"] = cursor
    async with gateway.http.get(f"{gateway.url}/v1/records", params=params, headers=bearer()) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def test_polls_page_through_the_log_and_say_when_it_is_exhausted(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        seqs = await gateway.append(count=7)
        got, cursor, answers = [], "start", []
        while True:
            answer = await poll(gateway, cursor, limit=3)
            got += [frame["seq"] for frame in answer["records"]]
            cursor = answer["cursor"]
            answers.append(answer["live"])
            if answer["live"]:
                break
        assert got == seqs
        assert answers[0] is False
        assert len(answers) <= 4
        assert await poll(gateway, cursor) == {"cursor": cursor, "live": True, "reset": None, "records": []}
        assert not len(gateway.context.sessions)


async def test_a_poll_waits_for_the_next_record_as_long_as_it_was_told(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        cursor = (await poll(gateway))["cursor"]
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert (await poll(gateway, cursor, wait=0.5))["records"] == []
        assert 0.4 < loop.time() - began < 2
        waiting = asyncio.create_task(poll(gateway, cursor, wait=20), name="poll")
        await eventually(lambda: len(gateway.context.sessions) == 1)
        await gateway.append()
        assert len((await waiting)["records"]) == 1


async def test_a_poll_that_has_heard_of_more_than_it_brings_does_not_say_live(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append()
        cursor = (await poll(gateway))["cursor"]
        waiting = asyncio.create_task(poll(gateway, cursor, wait=20), name="poll")
        await eventually(lambda: len(gateway.context.sessions) == 1)
        [log] = gateway.context.live._logs.values()
        await eventually(lambda: log.confirmed and log.followers[0].feed.state is State.LIVE)
        followers, log.followers = log.followers, []
        seqs = await gateway.append(count=300)  # their live copies are lost
        log.followers = followers
        seqs += await gateway.append()
        answer = await waiting
        assert [frame["seq"] for frame in answer["records"]] == seqs[: len(answer["records"])]
        assert answer["live"] is (len(answer["records"]) == len(seqs))
        rest = await poll(gateway, answer["cursor"])
        assert [frame["seq"] for frame in answer["records"] + rest["records"]] == seqs
        assert rest["live"] is True


async def test_a_client_that_gives_a_poll_up_leaves_no_session_behind(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        cursor = (await poll(gateway))["cursor"]
        polls = [asyncio.create_task(poll(gateway, cursor, wait=20), name="poll") for _ in range(3)]
        await eventually(lambda: len(gateway.context.sessions) == 4)
        for given_up in polls:
            given_up.cancel()
        await eventually(lambda: len(gateway.context.sessions) == 1)


async def test_a_poll_brings_a_bounded_number_of_bytes_and_leaves_the_rest_for_the_next(
    nats_server: NatsServer,
) -> None:
    body = b'{"id":"r","kind":"notification","data":"%b"}' % (b"x" * 250_000)
    async with gateway_on(nats_server) as gateway:
        seqs = await gateway.append(count=12, body=body)
        got, cursor, answers = [], "start", []
        while not answers or not answers[-1]["live"]:
            answers.append(await poll(gateway, cursor))
            got += [frame["seq"] for frame in answers[-1]["records"]]
            cursor = answers[-1]["cursor"]
        assert got == seqs
        assert max(len(answer["records"]) for answer in answers) <= 5
        assert len(answers) <= 4


async def test_a_poll_without_a_cursor_gets_the_reset_and_where_to_go_on(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=2)
        answer = await poll(gateway, None)
        assert (answer["reset"]["reason"], answer["reset"]["inbox"], answer["records"]) == ("new", [], [])
        seqs = await gateway.append(count=2)
        assert [frame["seq"] for frame in (await poll(gateway, answer["cursor"]))["records"]] == seqs


async def test_reads_marked_by_request_reach_every_device(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        await gateway.append(count=2)
        cursor = (await device.records(2))[-1]["cursor"]
        for body, expected in (
            ({"ids": ["r0"]}, {"ids": ["r0"]}),
            ({"up_to": cursor}, {"up_to": 2}),
            ({"all": True}, {"up_to": 4}),
        ):
            async with gateway.http.post(
                f"{gateway.url}/v1/inbox/read", json={"device": "tab", **body}, headers=bearer()
            ) as response:
                assert response.status == 202, await response.text()
            record = (await device.records(1))[0]["record"]
            assert record["device"] == "tab"
            assert expected.items() <= record.items()
        for body, status in (
            ({}, 400), ({"ids": []}, 400), ({"up_to": "x"}, 400), ({"up_to": "zzzzzzzz.1"}, 409), ({"oops": 1}, 400),
        ):  # fmt: skip
            async with gateway.http.post(
                f"{gateway.url}/v1/inbox/read", json={"device": "tab", **body}, headers=bearer()
            ) as response:
                assert response.status == status


async def test_reads_by_request_count_among_those_a_user_may_have_appended(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.sessions.READS_PER_MINUTE", 2)
    async with gateway_on(nats_server) as gateway:
        statuses = []
        for _ in range(3):
            body = {"device": "tab", "ids": ["r0"]}
            async with gateway.http.post(f"{gateway.url}/v1/inbox/read", json=body, headers=bearer()) as response:
                statuses.append(response.status)
        assert statuses == [202, 202, 429]
        assert (await gateway.broker.stream(gateway.stream())).messages == 2


# --- events ---------------------------------------------------------------------------------------------------------

KEY = "sk_test_0123456789"


@asynccontextmanager
async def with_keys(nats: NatsServer, postgres: str) -> AsyncIterator[TestGateway]:
    """A gateway that knows the API key `KEY` of tenant acme."""
    await migrate(postgres)
    await add_key(postgres, KEY, ["events:write"])
    async with gateway_on(nats, postgres_url=postgres) as gateway:
        yield gateway


async def add_key(url: str, key: str, scopes: list[str]) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "INSERT INTO api_keys (key_hash, tenant, name, scopes) VALUES ($1, 'acme', 'test', $2)",
            hashlib.sha256(key.encode()).digest(),
            scopes,
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


async def test_the_idempotency_key_names_an_event_without_an_id(nats_server: NatsServer, postgres: str) -> None:
    anonymous = {name: value for name, value in EVENT.items() if name != "id"}
    async with with_keys(nats_server, postgres) as gateway:
        answers = [await post(gateway, anonymous, **{"Idempotency-Key": "order-17"}) for _ in range(2)]
        assert [answer["event_id"] for _, answer in answers] == ["order-17", "order-17"]
        assert [answer["duplicate"] for _, answer in answers] == [False, True]
        _, named = await post(gateway, EVENT, **{"Idempotency-Key": "other"})
        assert named["event_id"] == "e1"
        ids = {(await post(gateway, anonymous))[1]["event_id"] for _ in range(2)}
        assert len(ids) == 2


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
        writer.write(head + body)
        async with asyncio.timeout(5):
            assert b" 202 " in await reader.readline()
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
    "an unknown priority": ({**EVENT, "priority": "urgent!"}, None),
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
    monkeypatch.setattr("gateway.api_keys.API_KEY_SECONDS", 0.2)
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


async def test_while_postgresql_is_away_known_keys_go_on_and_others_get_503(
    nats_server: NatsServer, postgres: str
) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, EVENT))[0] == 202
        admin = await asyncpg.connect(postgres)
        try:
            await admin.execute("ALTER TABLE api_keys RENAME TO gone")
            assert (await post(gateway, EVENT))[0] == 202
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
    monkeypatch.setattr("gateway.events_api.EVENT_BUDGET_SECONDS", 0.5)
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, EVENT))[0] == 202
        nats_server.kill()
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
        await eventually(lambda: gateway.context.broker.connected, timeout=15)
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
    monkeypatch.setattr("gateway.events_api.EVENT_BUDGET_SECONDS", 0.5)
    bodies = [{**EVENT, "id": f"e{number}", "to": [f"user{number % 2}"]} for number in range(40)]
    async with with_keys(nats_server, postgres) as gateway:
        assert (await post(gateway, EVENT))[0] == 202
        nats_server.kill()
        await eventually(lambda: not gateway.context.broker.connected)
        async with asyncio.timeout(2):
            status, answer = await post(gateway, {"events": bodies}, path="/v1/events/bulk")
        assert status == 202
        assert [result["event_id"] for result in answer["results"]] == [body["id"] for body in bodies]
        assert {result["error"]["status"] for result in answer["results"]} == {503}


async def test_a_body_that_never_ends_is_given_up(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bodies.REQUEST_BODY_SECONDS", 0.3)
    async with with_keys(nats_server, postgres) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = f"POST /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        async with asyncio.timeout(5):
            assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
