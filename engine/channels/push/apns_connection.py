"""One HTTP/2 connection to APNs: aioapns', with what of it would lose answers or send twice done otherwise.

Of aioapns 4.0 these stay: how a connection begins, flushes, is closed when nothing happens, and tells its owner that it is
lost. What it does with streams does not, because (each is a test in tests/integration/test_apns_connection.py)

- a request that was cancelled made `connection_lost` raise, and all others wait for ever;
- a stream that the server resets, and an error without a body, were never answered;
- an error whose body comes in two frames was no JSON;
- after 64 KiB of bodies the server may send no more: nobody told it that they were read. After 64 KiB of requests at once
  the next one raised, its headers sent;
- before the server's first SETTINGS it sent up to 1000 requests, where Apple allows one; a limit that was lowered did not hold;
- GOAWAY closed the connection, with the answers that were still to come;
- a lost connection made its pool send again what may have been sent, up to five times;
- nothing noticed a peer that is silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from aioapns.connection import APNsTLSClientProtocol
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import H2Error, NoAvailableStreamIDError

BODY_BYTES_MAX: Final = 4096
"""Of an answer; Apple's have less than 100 bytes."""

STREAMS_MAX: Final = 1000
"""Requests under way on one connection; Apple allows as many."""

IDLE_SECONDS: Final = 3600
"""How long a connection without requests stays. Apple asks for few and long connections, and takes many short ones for an
attack."""

SILENT_SECONDS: Final = 30.0
"""A connection on which nothing was heard for so long is asked for a sign of life before it is used: networks forget
connections."""


class NotDone(Exception):
    """APNs did nothing with the request, which may be sent again. `why`: a word."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Unknown(Exception):
    """The request has left, and no answer will come: it may have been sent. `why`: a word."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Answer(msgspec.Struct, frozen=True):
    """What APNs said. `apns_id`: its name of the push; `retry_after`: the header of that name."""

    status: int
    apns_id: str
    retry_after: str
    body: bytes


class _Stream:
    """A request that is under way."""

    __slots__ = ("body", "done", "headers")

    def __init__(self) -> None:
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def end(self) -> None:
        if self.done.done():
            return
        try:
            apns_id, wait = (self.headers.get(name, b"").decode() for name in (b"apns-id", b"retry-after"))
            answer = Answer(int(self.headers[b":status"]), apns_id, wait, bytes(self.body))
        except (KeyError, ValueError):
            self.done.set_exception(Unknown("malformed"))
        else:
            self.done.set_result(answer)


class _Http2(H2Connection):
    """h2's connection, which stays usable when the server says that it takes no more.

    After GOAWAY h2 refuses every further frame. But the server goes on to answer what it has taken (RFC 9113, 6.8), and Apple
    says GOAWAY whenever it moves load.
    """

    def _receive_goaway_frame(self, frame: Any) -> Any:
        before: ConnectionState = self.state_machine.state
        found = super()._receive_goaway_frame(frame)
        self.state_machine.state = before
        return found


class ApnsConnection(APNsTLSClientProtocol):
    """A connection that ends each request with an answer, NotDone or Unknown, whatever happens to it."""

    INACTIVITY_TIME = IDLE_SECONDS

    def __init__(self, on_lost: Callable[[ApnsConnection], None]) -> None:
        super().__init__(apns_topic="", loop=asyncio.get_running_loop())
        self._on_lost = on_lost
        self.conn = _Http2()
        self.heard_at = self.loop.time()
        self._streams: dict[int, _Stream] = {}
        self.lost = asyncio.Event()
        self._leaving = False
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._alive = asyncio.Event()

    @property
    def _wire(self) -> asyncio.Transport:
        assert self.transport is not None, "it is connected before anybody has it"
        return self.transport

    @property
    def usable(self) -> bool:
        """Whether a new request may be made on it."""
        return not self._leaving

    @property
    def is_busy(self) -> bool:
        """Whether a further request would have to wait."""
        return len(self._streams) >= self._streams_max

    @property
    def load(self) -> int:
        """How many requests are under way."""
        return len(self._streams)

    @property
    def _streams_max(self) -> int:
        return min(STREAMS_MAX, self.conn.remote_settings.max_concurrent_streams)

    async def wait_ready(self) -> None:
        """Until the server has said how many requests it takes at once. Raises NotDone: it never did."""
        await self._ready.wait()
        if self._leaving:
            raise NotDone("connection_lost")

    async def wait_alive(self) -> None:
        """Until the server has answered a PING, at once where it was heard of lately. Raises NotDone: the connection was lost."""
        if self.loop.time() - self.heard_at > SILENT_SECONDS:
            self._alive.clear()
            self.conn.ping(b"seamark?")
            self.flush()
            await self._alive.wait()
        if self._leaving:
            raise NotDone("connection_lost")

    async def request(self, headers: Sequence[tuple[str, str]], body: bytes, until: float) -> Answer:
        """Make a request, after waiting for room on the connection. When its caller is cancelled, it is taken back.

        Args:
            until: the deadline, by the clock of the loop.

        Raises:
            NotDone, Unknown: as they say.
        """
        try:
            async with asyncio.timeout_at(until):
                while self.usable and not self._has_room(len(body)):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise NotDone("timeout") from error
        if not self.usable:
            raise NotDone("connection_lost")
        stream_id, stream = self._begin(headers, body)
        began_at = self.loop.time()
        try:
            async with asyncio.timeout_at(until):
                return await stream.done
        except TimeoutError as error:
            if self.heard_at <= began_at:  # the peer is gone: no other request on this connection would fare better
                self.abort()
            raise Unknown("timeout") from error
        finally:
            self._end(stream_id)

    def _has_room(self, size: int) -> bool:
        return not self.is_busy and self.conn.outbound_flow_control_window >= size

    def _begin(self, headers: Sequence[tuple[str, str]], body: bytes) -> tuple[int, _Stream]:
        try:
            stream_id = self.conn.get_next_available_stream_id()
            self.conn.send_headers(stream_id, headers)
            self.conn.send_data(stream_id, body, end_stream=True)
        except NoAvailableStreamIDError as error:
            self._leave()
            raise NotDone("worn_out") from error
        except H2Error as error:  # the server allows less than a request is long: this connection is of no use
            self.abort()
            raise NotDone("refused") from error
        stream = self._streams[stream_id] = _Stream()
        self.flush()
        return stream_id, stream

    def _end(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id)
        if stream.done.cancelled() and not self._wire.is_closing():
            try:
                self.conn.reset_stream(stream_id, ErrorCodes.CANCEL)
                self.flush()
            except H2Error:
                pass  # it has just ended by itself
        self._changed.set()
        if self._leaving and not self._streams:
            self.close()

    def close(self) -> None:
        """Close it; what is under way ends as Unknown."""
        self._leaving = True
        super().close()

    def abort(self) -> None:
        """Give it up at once: nothing is to be expected of it."""
        self._leaving = True
        self._wire.abort()

    def _leave(self) -> None:
        """Begin nothing new; close when all is answered."""
        self._leaving = True
        self._changed.set()
        if not self._streams:
            self.close()

    def flush(self) -> None:
        """Write what is to be sent. To a transport that is closing nothing can be."""
        if not self._wire.is_closing():
            super().flush()

    def data_received(self, data: bytes) -> None:
        """Take what the server sends."""
        self.heard_at = self.loop.time()
        try:
            for event in self.conn.receive_data(data):
                self._take(event)
        except H2Error:
            self.abort()
            return
        self.flush()

    def _take(self, event: Event) -> None:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        match event:
            case ResponseReceived() if stream:
                stream.headers = {bytes(name): bytes(value) for name, value in event.headers or ()}
            case DataReceived():
                self.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if stream and len(stream.body) < BODY_BYTES_MAX:
                    stream.body += event.data or b""
            case StreamEnded() if stream:
                stream.end()
            case StreamReset() if stream:
                refused = event.error_code == ErrorCodes.REFUSED_STREAM  # RFC 9113, 8.7: nothing was done with it
                stream.fail(NotDone("refused_stream") if refused else Unknown("stream_reset"))
            case RemoteSettingsChanged():
                self._ready.set()
            case PingAckReceived():
                self._alive.set()
            case ConnectionTerminated():
                self.on_connection_terminated(event)
            case _:
                pass
        self._changed.set()  # room on the connection: a window was opened, a limit raised, a stream ended

    def on_connection_terminated(self, event: ConnectionTerminated) -> None:
        """The server takes no more: what it has not begun goes elsewhere, the rest is still answered."""
        last = event.last_stream_id or 0
        for stream_id, stream in self._streams.items():
            if stream_id > last:
                stream.fail(NotDone("goaway"))
        self._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._leaving = True
        if self.inactivity_timer:
            self.inactivity_timer.cancel()
        self._on_lost(self)
        for stream in self._streams.values():
            stream.fail(Unknown("connection_lost"))
        for event in (self._ready, self._alive, self._changed, self.lost):
            event.set()
