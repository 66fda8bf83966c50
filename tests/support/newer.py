"""A real gateway of a later version, as far as an SDK can tell: whatever it says passes here, and comes out with more in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from tests.support.gatewaysim import blank, sdk

FOREIGN: list[dict[str, Any]] = [
    {"op": "sparkle", "cursor": "zzzzzzzz.999", "seq": 999, "prev": 998},
    {
        "op": "record",
        "feed": "topic:news",
        "seq": 9999,
        "prev": 9998,
        "cursor": "p~9",
        "record": {"id": "of another log"},
    },
    {"op": "skip", "feed": "topic:news", "seq": 9999, "prev": 9998, "cursor": "p~9"},
    {
        "op": "reset",
        "feed": "topic:news",
        "seq": 9999,
        "cursor": "p~9",
        "reason": "trimmed",
        "unread": None,
        "inbox": [],
    },
]
"""Frames that no version of today knows, or must not take for its own."""


def newer(frame: dict[str, Any]) -> list[dict[str, Any]]:
    """What a later version says in place of `frame`."""
    more = {**frame, "sparkle": {"colour": [1, 2]}, "sets": {"topic:news": "p~9"}}
    if isinstance(frame.get("unread"), dict):
        more["unread"] = {**frame["unread"], "topics": {"news": 3}}
    if frame["op"] == "ready":
        return [FOREIGN[0], {**more, "capabilities": ["feeds", "sparkle"]}]
    return [*FOREIGN, more]


class NewerGateway:
    """Stands before a gateway of today."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.url = ""
        self.said: list[dict[str, Any]] = []
        """What clients said."""

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        client = web.WebSocketResponse(compress=False, protocols=("seamark.v1",))
        await client.prepare(request)
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{self._upstream}/v1/ws") as gateway:
            down = asyncio.create_task(self._down(gateway, client), name="down")
            try:
                async for message in client:
                    self.said.append(json.loads(message.data))
                    await gateway.send_str(message.data)
            finally:
                down.cancel()
                await asyncio.gather(down, return_exceptions=True)
        return client

    async def _down(self, gateway: aiohttp.ClientWebSocketResponse, client: web.WebSocketResponse) -> None:
        async for message in gateway:
            for frame in newer(json.loads(message.data)):
                await client.send_str(json.dumps(frame))
        await client.close(code=gateway.close_code or 1006)


@asynccontextmanager
async def newer_gateway(upstream: str) -> AsyncIterator[NewerGateway]:
    """A running one, on a free port."""
    gateway = NewerGateway(upstream)
    app = web.Application()
    app.router.add_get("/v1/ws", gateway._pass_on)
    app.router.add_get("/", blank)
    app.router.add_get("/seamark.js", sdk)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield gateway
    finally:
        await runner.cleanup()
