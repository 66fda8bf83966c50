"""Server-sent events, and what every request over HTTP gets that cannot be served, on a real nats-server."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from ops.dev.servers import NatsServer
from tests.support.gateways import QUICK, TestGateway, gateway_on
from tests.support.logs import eventually, of_clients
from tests.support.tokens import bearer, token


class Stream:
    """A reader of server-sent events without any cleverness."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.comments = 0

    async def next(self, timeout: float = 30.0) -> tuple[str | None, str, dict[str, Any]]:
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
        async with stream(gateway) as events:
            await events.until("live")

            async def end() -> dict[str, Any]:
                while True:
                    _, name, data = await events.next()
                    if name == "close":
                        return data

            ended = asyncio.create_task(end(), name="reads on")
            await eventually(lambda: events.comments >= 2)
            [session] = gateway.context.sessions.everyone()
            session._expires_at = time.time()  # as after the two hours that its token is good for
            data = await ended
            assert (data["code"], data["name"]) == (4401, "unauthenticated")
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
        async with asyncio.timeout(20):
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
        async with asyncio.timeout(20):
            assert b" 405 " in await reader.readline()
        assert not len(gateway.context.sessions)
        writer.close()
        await writer.wait_closed()


async def test_a_refusal_in_the_log_names_no_notification(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        url = f"{gateway.url}/v1/notifications/reset-of-alice@example.com/trace"
        with capture_logs() as lines:
            async with gateway.http.get(url, headers={"Authorization": "Bearer x.y.z"}) as response:
                assert response.status == 401
            async with gateway.http.get(url, headers={"Origin": "https://evil.example"}) as response:
                assert response.status == 403
    assert [(line["event"], line["code"], line["route"]) for line in of_clients(lines)] == [
        ("request_refused", "unauthenticated", "/v1/notifications/{id}/trace"),
        ("request_refused", "origin", "/v1/notifications/{id}/trace"),
    ]
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
        assert {"type", "title", "status", "detail", "code", "request_id"} == set(problem) - {"field"}
        assert problem["request_id"] == response.headers["X-Request-Id"]
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
