"""aiohttp's server connection, with two hooks: a drained socket tells its session, and so does a lost one.

aiohttp wakes a coroutine that awaits `drain()`; a session has none to spare. The hooks are the protocol's own callbacks
(`asyncio.Protocol.resume_writing`, `connection_lost`), overridden in a sub-class of the public `RequestHandler`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from gateway.http.problems import HEAD_TOO_LARGE, INTERNAL, MALFORMED, Problem, request_id
from gateway.limits import ANSWER_STUCK_SECONDS, HEAD_FIELD_BYTES, HEAD_LINE_BYTES, REQUEST_HEAD_SECONDS

_log = structlog.get_logger("seamark.connection")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Connection(web.RequestHandler):
    """One accepted connection."""

    __slots__ = ("on_lost", "on_writable")

    def __init__(self, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self.on_writable: Callable[[], None] | None = None
        self.on_lost: Callable[[], None] | None = None

    def pause_writing(self) -> None:
        """The client reads slowly. A session sees to that by itself; any other answer must move on."""
        super().pause_writing()
        self._must_move(-1)

    def _must_move(self, unsent_before: int) -> None:
        if self.transport is None or self.on_writable is not None or not self._paused:
            return
        unsent = self.transport.get_write_buffer_size()
        if unsent == unsent_before:
            self.transport.abort()
        else:
            asyncio.get_running_loop().call_later(ANSWER_STUCK_SECONDS, self._must_move, unsent)

    def resume_writing(self) -> None:
        """The write buffer is below its low-water mark."""
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone: let go of the session, whose outlet refers to this."""
        on_lost, self.on_lost, self.on_writable = self.on_lost, None, None
        super().connection_lost(exc)
        if on_lost is not None:
            on_lost()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer where no handler has: to a malformed request, or after a fault of ours.

        aiohttp's own messages quote the request, which may hold a token, both in its log and to the client.
        """
        if isinstance(exc, HttpProcessingError):
            kind, detail = MALFORMED, "this is no valid HTTP request"
            if isinstance(exc, LineTooLong):
                kind = HEAD_TOO_LARGE
                detail = f"the first line may have {HEAD_LINE_BYTES} bytes, a header {HEAD_FIELD_BYTES}"
            problem = Problem(kind, detail, error=type(exc).__name__)
        else:
            if not isinstance(exc, ConnectionError):  # the client has left
                _log.error("request_failed", request_id=request_id(request), exc_info=exc)
            problem = Problem(INTERNAL, "the request failed; it was logged")
        if request.writer.output_size > 0:
            raise ConnectionError("something was answered already")
        response = problem.response(request)
        response.force_close()
        return response


class _Server(web.Server):
    """Makes `Connection`s."""

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Runs an application over `Connection`s.

    `keepalive_timeout` bounds the wait for a complete request head, on a fresh connection as on a kept one: aiohttp has
    no other guard against a client that sends its head byte by byte.

    Args:
        app: answers everything but `direct`.
        direct: handlers of `GET` requests by exact path, without router and middlewares: their frames would be kept for
            as long as a WebSocket lives (1.5 KB a session).
        head_seconds: for a complete request head.
        options: of `web.AppRunner`.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        direct: Mapping[str, Handler] | None = None,
        head_seconds: float = REQUEST_HEAD_SECONDS,
        **options: Any,
    ) -> None:
        self._direct = dict(direct or {})
        self._connection_options: dict[str, Any] = {
            "keepalive_timeout": head_seconds,
            "access_log": None,
            # aiohttp would decompress a body before its sender is authenticated: 60 KB can cost the loop 0.2 s.
            "auto_decompress": False,
            "tcp_keepalive": True,
            "max_line_size": HEAD_LINE_BYTES,
            "max_field_size": HEAD_FIELD_BYTES,
        }
        super().__init__(app, **self._connection_options, **options)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        direct, routed = self._direct, made.request_handler

        def handle(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
            handler = direct.get(request.path) if request.method == "GET" else None
            return routed(request) if handler is None else handler(request)

        return _Server(
            handle,
            request_factory=made.request_factory,
            loop=asyncio.get_running_loop(),
            **self._connection_options,
        )


def connection_of(request: web.BaseRequest) -> Connection:
    """The connection a request came on.

    Raises:
        TypeError: the application does not run under `Runner`.
    """
    protocol = request.protocol
    if not isinstance(protocol, Connection):
        raise TypeError("the gateway's application runs under gateway.carriers.connection.Runner only")
    return protocol
