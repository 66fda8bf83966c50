"""`GET /v1/records`: the same session for one request, for clients that can neither keep a socket nor a stream.

Answers `{"after", "cursor", "live", "reset", "records"}`: `records` are frames as on the WebSocket, all those after `after` up to
`cursor`; `reset` is the frame if there was one, `live` whether the log was exhausted. The next request sends `cursor` back, and
`POST /v1/ack` takes `after` and `cursor`. With `wait`, an exhausted log is waited on for so many seconds.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from gateway.access.admission import admit, count_request, user_of
from gateway.carriers.connection import connection_of
from gateway.carriers.sse import device_of, wants_snapshot
from gateway.context import CONTEXT
from gateway.http.problems import Problem
from gateway.limits import POLL_BYTES, POLL_JOIN_SECONDS, POLL_LIMIT, POLL_WAIT_SECONDS, RETRY_AFTER_SECONDS
from gateway.session.session import Session
from seamark.protocol.close_codes import CloseCode


class PollOutlet:
    """Gathers frames until there is something to answer with."""

    __slots__ = (
        "_bytes",
        "_limit",
        "_loop",
        "after",
        "answered",
        "closed",
        "cursor",
        "exhausted",
        "live",
        "on_writable",
        "records",
        "reset",
    )

    tells_live: Final = False
    """The answer's `cursor` stands for `live`: its first record follows the cursor of the request."""

    def __init__(self, limit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._bytes = 0
        self.answered: asyncio.Future[None] = self._loop.create_future()
        self.exhausted: asyncio.Future[None] = self._loop.create_future()
        self.closed: tuple[CloseCode, str] | None = None
        self.after: bytes | None = None
        self.cursor: bytes | None = None
        self.records: list[bytes] = []
        self.reset = b"null"
        self.live = False

    def room(self) -> bool:
        """Fewer records than asked for are gathered. What is refused is left for the next request."""
        return len(self.records) < self._limit and self._bytes < POLL_BYTES

    def send(self, frame: bytes, epoch: bytes = b"", seq: int = 0) -> None:
        """Gather what belongs into the answer."""
        if epoch:
            self.cursor = b"%b.%d" % (epoch, seq)
        op = frame[7:10]
        if op in (b"rec", b"ski"):
            self.records.append(frame)
            self._bytes += len(frame)
            if not self.room() or self.exhausted.done():
                # What arrives in the same turn of the loop goes into the same answer.
                self._loop.call_soon(_done, self.answered)
        elif op == b"rea":
            self.after = self.cursor
        elif op == b"res":
            self.after, self.reset = self.cursor, frame
            self.records.clear()  # the reset tells the client to forget them
            self._bytes = 0
        elif op == b"liv":
            _done(self.exhausted)
            if self.records or self.reset != b"null":
                _done(self.answered)

    def ping(self) -> bool:
        """There is nobody to ping."""
        return False

    def stuck_seconds(self) -> float:
        """A request is bounded by its own deadline."""
        return 0.0

    def close(self, code: CloseCode, detail: str) -> None:
        """The session was ended: answer so."""
        self.closed = (code, detail)
        _done(self.exhausted)
        _done(self.answered)

    def gone(self) -> None:
        """The client has left: nobody waits for the answer."""
        _done(self.exhausted)
        _done(self.answered)

    def body(self) -> bytes:
        """The answer."""
        # It may have been exhausted, and then have heard of more than it could gather.
        live = b"true" if self.live and self.exhausted.done() and self.room() else b"false"
        after, cursor = (b"null" if at is None else b'"%b"' % at for at in (self.after, self.cursor))
        records = b",".join(self.records)
        return b'{"after":%b,"cursor":%b,"live":%b,"reset":%b,"records":[%b]}' % (
            after,
            cursor,
            live,
            self.reset,
            records,
        )


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def records(request: web.Request) -> web.StreamResponse:
    """One poll."""
    context = request.app[CONTEXT]
    admit(request, context)
    claims = await user_of(request, context)
    count_request(request, context, claims)
    device = device_of(request)
    limit = int(_number(request, "limit", POLL_LIMIT, 1, POLL_LIMIT))
    snapshot = wants_snapshot(request)
    wait_seconds = _number(request, "wait", 0, 0, POLL_WAIT_SECONDS)
    outlet = PollOutlet(limit)
    session = Session(context, outlet, "poll")
    # A client that gives up and asks again must not be one session more for as long as it would have waited.
    connection = connection_of(request)
    connection.on_lost = outlet.gone
    if connection.transport is None:
        outlet.gone()
    try:
        session.start(claims, device, request.query.get("cursor"), snapshot=snapshot)
        await _wait(outlet, wait_seconds)
        outlet.live = session.live
    finally:
        session.gone()
        connection.on_lost = None
    if outlet.closed is not None:
        code, detail = outlet.closed
        retry_after_seconds = RETRY_AFTER_SECONDS if code.status == 503 else None
        raise Problem(code.status, code.name, detail, retry_after_seconds=retry_after_seconds)
    return web.Response(body=outlet.body(), content_type="application/json", headers={"Cache-Control": "no-store"})


async def _wait(outlet: PollOutlet, wait_seconds: float) -> None:
    """Until there is an answer, or the log is exhausted and nothing came within the wait.

    Raises:
        Problem: 503, the log could not be joined in time.
    """
    first = asyncio.wait(
        (outlet.answered, outlet.exhausted), timeout=POLL_JOIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
    )
    done, _ = await first
    if not done:
        raise Problem(503, "unavailable", "the log does not answer", retry_after_seconds=RETRY_AFTER_SECONDS)
    if not outlet.answered.done() and wait_seconds > 0:
        await asyncio.wait((outlet.answered,), timeout=wait_seconds)


def _number(request: web.Request, name: str, default: float, least: float, most: float) -> float:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError as error:
        raise Problem(400, "invalid_query", f"`{name}` must be a number", field=name) from error
    if not value >= least:
        raise Problem(400, "invalid_query", f"`{name}` must be at least {least:g}", field=name)
    return min(value, most)
