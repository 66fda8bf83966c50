"""`GET /v1/records`: the same session for one request, for clients that can neither keep a socket nor a stream.

Answers `{"after", "cursor", "live", "reset", "records"}`: `records` are frames as on the WebSocket, all those after `after` up to
`cursor`; `reset` is the frame if there was one, `live` whether the log was exhausted. The next request sends `cursor` back, and
`POST /v1/ack` takes `after` and `cursor`. With `wait`, an exhausted log is waited on for so many seconds.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

import msgspec

from gateway.access.principals import User
from gateway.carriers.connection import connection_of
from gateway.carriers.sse import SessionQuery
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import UNAVAILABLE, Kind, Problem
from gateway.limits import POLL_BYTES, POLL_JOIN_SECONDS, POLL_LIMIT, POLL_WAIT_SECONDS
from gateway.session.session import Session
from seamark.protocol.close_codes import TABLE, CloseCode


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


class PollQuery(SessionQuery, frozen=True):
    """How many records at most, and how many seconds to wait for a first one. Larger values count as the largest allowed."""

    limit: Annotated[int, msgspec.Meta(ge=1)] = POLL_LIMIT
    wait: Annotated[float, msgspec.Meta(ge=0)] = 0


class Polled(msgspec.Struct):
    """What follows the cursor that was asked with.

    Attributes:
        after: what the records follow: the cursor that was asked with, or that of the `reset`.
        cursor: what to ask with next.
        live: whether that was all.
        reset: the frame `reset`, if there was one.
        records: the frames `record` and `skip`, as on a WebSocket.
    """

    after: str | None
    cursor: str | None
    live: bool
    reset: dict[str, Any] | None
    records: list[dict[str, Any]]


_STATUS: Final = {4401: 401, 4403: 403, 4409: 409}
"""The status that answers for a session that was closed with this code; 503 for all other codes."""

_ENDED: Final = {row.code: Kind(_STATUS.get(row.code, 503), row.name) for row in TABLE}


@Endpoint("GET", "/v1/records", opens_session=True, refuses=tuple(_ENDED.values()))
async def poll_records(call: Call[User, PollQuery, None]) -> Annotated[msgspec.Raw, Polled]:
    """Ask for the records of the user's log that follow a cursor; with `wait`, until there is one."""
    query = call.query
    outlet = PollOutlet(min(query.limit, POLL_LIMIT))
    session = Session(call.context, outlet, "poll")
    # A client that gives up and asks again must not be one session more for as long as it would have waited.
    connection = connection_of(call.request)
    connection.on_lost = outlet.gone
    if connection.transport is None:
        outlet.gone()
    try:
        session.start(call.principal, query.device, query.cursor, snapshot=query.snapshot)
        await _wait(outlet, min(query.wait, POLL_WAIT_SECONDS))
        outlet.live = session.live
    finally:
        session.gone()
        connection.on_lost = None
    if outlet.closed is not None:
        code, detail = outlet.closed
        raise Problem(_ENDED[code.code], detail)
    return msgspec.Raw(outlet.body())


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
        raise Problem(UNAVAILABLE, "the log does not answer")
    if not outlet.answered.done() and wait_seconds > 0:
        await asyncio.wait((outlet.answered,), timeout=wait_seconds)
