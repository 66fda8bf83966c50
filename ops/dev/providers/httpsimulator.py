"""A simulated provider that speaks HTTP/1.1, over TLS or without."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from ops.dev.providers.acceptlog import AcceptLog
from ops.dev.providers.faults import Answers, Faults, Hangs, Late, NoTls, Resets, SlowBody

STOP_SECONDS: Final = 1.0
"""How long requests may take when it stops; those that hang are cut off."""

BODY_BYTES_MAX: Final = 1 << 20

_RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER for no seconds: the kernel sends RST instead of FIN."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpSimulator(abc.ABC):
    """What simulators over HTTP have in common. Use it as `async with`.

    Args:
        host: the address to listen at.
        port: 0: a free one.
        tls: with it, https.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.log = AcceptLog()
        self.faults = Faults()
        self.spared: frozenset[str] = frozenset()
        """Paths at which no fault is met."""
        self.requests = 0
        """How many have come, whatever became of them."""
        self._host, self._port, self._tls = host, port, tls
        self._runner: web.AppRunner | None = None
        if tls is not None:
            tls.sni_callback = self._greeted

    @abc.abstractmethod
    def routes(self) -> list[web.RouteDef]:
        """What it answers."""

    @abc.abstractmethod
    def refusal(self, fault: Answers) -> web.Response:
        """A refusal in the provider's own form."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def url(self) -> str:
        """Of its root, without a slash at the end."""
        return f"{'http' if self._tls is None else 'https'}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen."""
        app = web.Application(middlewares=[self._faulty], client_max_size=BODY_BYTES_MAX)
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_SECONDS)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls).start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and cut off what is under way."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Any:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _greeted(self, _socket: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> int | None:
        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR if self.faults.breaks_tls else None

    @web.middleware
    async def _faulty(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.requests += 1
        fault = None if request.path in self.spared else self.faults.next()
        match fault:
            case None | NoTls():
                return await handler(request)
            case Answers():
                await request.read()
                return self.refusal(fault)
            case Hangs(accepts=accepts):
                await self._take(request, handler, accepts=accepts)
                await asyncio.Event().wait()  # until the other side gives up, which cancels this
            case Resets(accepts=accepts):
                await self._take(request, handler, accepts=accepts)
                _reset(request)
            case Late(seconds=seconds):
                await asyncio.sleep(seconds)
                return await handler(request)
            case SlowBody(seconds=seconds):
                return await _slowly(request, await handler(request), seconds)
        return web.Response(status=500)  # nobody is there to read it

    async def _take(self, request: web.Request, handler: Handler, *, accepts: bool) -> None:
        await request.read()
        if accepts:
            await handler(request)


def _reset(request: web.Request) -> None:
    transport = request.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        transport.abort()


async def _slowly(request: web.Request, answer: web.StreamResponse, seconds: float) -> web.StreamResponse:
    assert isinstance(answer, web.Response)
    body = answer.body if isinstance(answer.body, bytes) else b""
    stream = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
    stream.content_length = len(body) or 1
    await stream.prepare(request)
    with contextlib.suppress(ConnectionError):
        for byte in body or b" ":
            await stream.write(bytes((byte,)))
            await asyncio.sleep(seconds)
    return stream
