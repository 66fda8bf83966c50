"""The outbox page of a development stack: what every channel has accepted, and switches for faults. For this machine only.

It shows texts and addresses of everybody, and links by which anybody may be unsubscribed, so that no other site may read it: see
`gateway.api.dev_page`. A mail's HTML comes from whoever wrote the template. It is served apart, under a policy by which it can
neither run nor load anything, and shown in a frame that is a site of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import msgspec
from aiohttp import web

from gateway.api.dev_page import PAGE_FOLDER, PAGE_HEADERS, check_local
from gateway.http.problems import Handler, Problem
from ops.dev.outbox.faults import FaultName
from ops.dev.outbox.messages import MESSAGES_MAX, Outbox
from ops.dev.outbox.people import People
from ops.dev.outbox.providers import Providers, Word
from ops.served import served

LIMIT: Final = 100
STREAMS_MAX: Final = 16
"""Pages that are told of changes at once; browsers hold six to one site."""

BEAT_SECONDS: Final = 15.0
PAUSE_SECONDS: Final = 0.2
"""Between two words to one page: a campaign accepts thousands of messages a second."""

_WEB: Final = Path(__file__).parents[1] / "web"
FILES: Final = {
    "/": (_WEB / "outbox.html", "text/html"),
    "/outbox.js": (_WEB / "outbox.js", "text/javascript"),
    "/outbox.css": (_WEB / "outbox.css", "text/css"),
    "/style.css": (PAGE_FOLDER / "style.css", "text/css"),
    "/favicon.svg": (PAGE_FOLDER / "favicon.svg", "image/svg+xml"),
}
"""What is served, by path: its own files, and how the page of the gateway looks."""

_POLICY: Final = "Content-Security-Policy"
_OF_PAGE: Final = PAGE_HEADERS | {_POLICY: f"{PAGE_HEADERS[_POLICY]}; frame-src 'self'"}
_OF_MAIL: Final = PAGE_HEADERS | {
    _POLICY: "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'self'"
}
CHANNELS: Final = ("push", "email", "sms", "webhook")


class _Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    channel: str | None = None
    user: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=MESSAGES_MAX)] = LIMIT


class _Switch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fault: FaultName | None


class _Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tell: Word


@contextlib.asynccontextmanager
async def serving(
    host: str, port: int, outbox: Outbox, providers: Providers, people: People, inbox_url: Callable[[], str] = str
) -> AsyncIterator[str]:
    """Serve the page for as long as the block runs; gives its address.

    Args:
        host: of loopback.
        port: 0: chosen by the system.
        inbox_url: where the inbox page is, once that is known; "": not yet.

    Raises:
        OSError: the port is taken.
    """
    async with served(_Page(outbox, providers, people, inbox_url).app(), host, port) as bound:
        yield f"http://{host}:{bound}"


class _Page:
    def __init__(self, outbox: Outbox, providers: Providers, people: People, inbox_url: Callable[[], str]) -> None:
        self._outbox, self._providers, self._people, self._inbox_url = outbox, providers, people, inbox_url
        self._streams = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=4096, middlewares=[_this_machine_only])
        app.router.add_get("/messages", self._messages)
        app.router.add_delete("/messages", self._clear)
        app.router.add_get("/messages/{number:[0-9]{1,15}}/html", self._html)
        app.router.add_post("/messages/{number:[0-9]{1,15}}/tell", self._tell)
        app.router.add_put("/faults/{channel}", self._switch)
        app.router.add_get("/changes", self._changes)
        for path, file in FILES.items():
            app.router.add_get(path, _static(*file))
        return app

    async def _messages(self, request: web.Request) -> web.Response:
        try:
            query = msgspec.convert(dict(request.query), _Query, strict=False)
        except msgspec.ValidationError as error:
            return web.Response(status=400, text=f"{error}: the query may hold channel, user and limit")
        if query.channel not in (None, *CHANNELS):
            return web.Response(status=400, text=f"channel must be one of {', '.join(CHANNELS)}")
        named = await self._people.named(self._outbox.newest_first(query.channel))
        found = [one for one in named if query.user in (None, one.user)]
        return _json(
            {
                "inbox_url": self._inbox_url(),
                "accepted": self._outbox.accepted,
                "found": len(found),
                "users": sorted({one.user for one in named if one.user}),
                "faults": self._providers.standing,
                "messages": found[: query.limit],
            }
        )

    async def _clear(self, _: web.Request) -> web.Response:
        self._outbox.clear()
        return _json({})

    async def _html(self, request: web.Request) -> web.Response:
        html = self._outbox.html_of(int(request.match_info["number"]))
        if not html:
            return web.Response(status=404, text="no such mail, or it is no longer kept", headers=_OF_MAIL)
        return web.Response(text=html, content_type="text/html", headers=_OF_MAIL)

    async def _tell(self, request: web.Request) -> web.Response:
        try:
            word = msgspec.json.decode(await request.read(), type=_Told).tell
        except msgspec.MsgspecError as error:
            return web.Response(status=400, text=f'{error}: send {{"tell": "stop"}}')
        number = int(request.match_info["number"])
        message = next((one for one in self._outbox.newest_first() if one.number == number), None)
        try:
            if message is None:
                raise LookupError
            status = await self._providers.tell(message, word)
        except LookupError:
            why = "there is no such message, it is no longer kept, or its provider cannot say that of it"
            return web.Response(status=404, text=why)
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            return web.Response(status=502, text=f"the gateway does not take it: {type(error).__name__}")
        if status != 200:
            return web.Response(status=502, text=f"the gateway answers {status}")
        return _json({})

    async def _switch(self, request: web.Request) -> web.Response:
        channel = request.match_info["channel"]
        if channel not in CHANNELS:
            return web.Response(status=404, text=f"there are {', '.join(CHANNELS)}")
        try:
            self._providers.switch(channel, msgspec.json.decode(await request.read(), type=_Switch).fault)
        except msgspec.MsgspecError as error:
            return web.Response(status=400, text=f'{error}: send {{"fault": "hang"}}, or {{"fault": null}}')
        return _json(self._providers.standing)

    async def _changes(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: the version, whenever it is another."""
        if self._streams >= STREAMS_MAX:
            return web.Response(status=503, text="too many pages are open")
        stream = web.StreamResponse(headers=PAGE_HEADERS | {"Content-Type": "text/event-stream"})
        self._streams += 1
        try:
            await stream.prepare(request)
            seen = -1
            while True:
                seen = await self._outbox.changed(seen, BEAT_SECONDS)
                await stream.write(b"data: %d\n\n" % seen)
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self._streams -= 1


@web.middleware
async def _this_machine_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No other site may read what was sent, or switch anything. The page itself holds nothing, and may be linked."""
    if request.path not in FILES:
        try:
            check_local(request)
        except Problem as problem:
            return web.Response(status=problem.kind.status, text=problem.detail)
    return await handler(request)


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", headers=PAGE_HEADERS)


def _static(file: Path, content_type: str) -> Handler:
    read = file.read_bytes

    async def serve(_: web.Request) -> web.StreamResponse:
        # Read at each request: whoever changes the page sees it at the next reload.
        return web.Response(body=read(), content_type=content_type, charset="utf-8", headers=_OF_PAGE)

    return serve
