"""Where the frames of one session leave: whole frames, gathered per turn of the loop, written at once, never taken back.

A socket that does not read is seen by the size of its transport's write buffer. A session without room is called back
when the buffer has drained; nothing is awaited per frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from gateway.limits import LINGER_SECONDS, ROOM_BYTES, WRITE_HIGH_BYTES, WRITE_LOW_BYTES
from gateway.session.frames import PING_FRAME, close_frame, pong_bytes, text_header
from gateway.session.wheel import Wheel
from seamark.protocol.close_codes import CloseCode


class Outlet(Protocol):
    """What a session writes to, whatever carries it."""

    @property
    def tells_live(self) -> bool:
        """Whether `live` reaches the client: only a cursor that it has seen can be the `prev` of its next record."""
        ...

    def room(self) -> bool:
        """Whether another record may be sent; after a no, `on_writable` is called once there is room."""
        ...

    def send(self, frame: bytes, epoch: bytes = b"", seq: int = 0) -> None:
        """Send one frame of the protocol. `<epoch>.<seq>` is the cursor the client holds then; no epoch: it moves none."""
        ...

    def ping(self) -> bool:
        """Provoke an answer; False when this carrier has no answer and only shows life."""
        ...

    def close(self, code: CloseCode, detail: str) -> None:
        """Say why and end; what was sent before still goes out, within the linger time."""
        ...

    def stuck_seconds(self) -> float:
        """How long unsent bytes have been waiting without any room; 0 when there is room."""
        ...


class Flusher:
    """Writes, once per turn of the loop, what the turn has given to outlets. One per process."""

    __slots__ = ("_dirty", "_loop", "_scheduled")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._dirty: list[SocketOutlet] = []
        self._scheduled = False

    def add(self, outlet: SocketOutlet) -> None:
        """`outlet` has frames to write."""
        self._dirty.append(outlet)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        self._scheduled = False
        for outlet in dirty:
            outlet.flush()


class SocketOutlet:
    """An outlet over a transport. Sub-classes say how a frame looks on the wire.

    Args:
        transport: the connection's, after the response's head was written.
        flusher: shared by all outlets of the process.
        wheel: shared timers, for the linger time.
    """

    __slots__ = ("_closing", "_flusher", "_full_since", "_parts", "_pending", "_transport", "_wants_room", "_wheel",
                 "on_writable")  # fmt: skip

    tells_live: Final = True

    def __init__(self, transport: asyncio.Transport, flusher: Flusher, wheel: Wheel) -> None:
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES, low=WRITE_LOW_BYTES)
        self._transport = transport
        self._flusher = flusher
        self._wheel = wheel
        self._parts: list[bytes] = []
        self._pending = 0
        self._wants_room = False
        self._full_since = 0.0
        self._closing = False
        self.on_writable: Callable[[], None] | None = None

    def room(self) -> bool:
        """Less than 64 KiB are unsent. After a no, `on_writable` follows when the socket has drained."""
        if self._pending + self._transport.get_write_buffer_size() < ROOM_BYTES:
            return True
        if not self._wants_room:
            self._wants_room = True
            self._full_since = self._wheel.now()
        return False

    def stuck_seconds(self) -> float:
        """How long this socket has had no room."""
        return self._wheel.now() - self._full_since if self._wants_room else 0.0

    def _put(self, *parts: bytes) -> None:
        if self._closing:
            return
        if not self._parts:
            self._flusher.add(self)
        for part in parts:
            self._parts.append(part)
            self._pending += len(part)

    def flush(self) -> None:
        """Write what was gathered. The flusher calls this; so does closing."""
        if not self._parts:
            return
        data = self._wrap(b"".join(self._parts))
        self._parts.clear()
        self._pending = 0
        if self._transport.is_closing():
            return
        self._transport.write(data)
        if self._wants_room and self._transport.get_write_buffer_size() < ROOM_BYTES:
            # All of it fitted into the socket, or the transport was never paused: nobody else would call.
            asyncio.get_running_loop().call_soon(self.writable)

    def _wrap(self, data: bytes) -> bytes:
        return data

    def writable(self) -> None:
        """The transport has drained below its low-water mark (called by the connection)."""
        if self._wants_room and not self._closing:
            self._wants_room = False
            if self.on_writable is not None:
                self.on_writable()

    def _end(self, last: bytes) -> None:
        """Write `last` and close when it is sent; abort when it cannot be within the linger time."""
        if self._closing:
            return
        self._put(last)
        self.flush()
        self._closing = True
        if not self._transport.is_closing():
            self._wheel.later(LINGER_SECONDS, self.abort)

    def abort(self) -> None:
        """Drop the connection and whatever is unsent."""
        self._closing = True
        self._parts.clear()
        self._transport.abort()


class WebSocketOutlet(SocketOutlet):
    """Unmasked RFC 6455 text frames, written beside aiohttp's own: all are whole frames, so any order is a valid one."""

    __slots__ = ()

    def send(self, frame: bytes, epoch: bytes = b"", seq: int = 0) -> None:
        """One text frame."""
        # `_put` written out for two parts: its loop would cost each record too much.
        if self._closing:
            return
        parts, size = self._parts, len(frame)
        if not parts:
            self._flusher.add(self)
        head = text_header(size)
        parts.append(head)
        parts.append(frame)
        self._pending += len(head) + size

    def ping(self) -> bool:
        """A protocol ping, which every browser answers by itself."""
        self._put(PING_FRAME)
        return True

    def pong(self, payload: bytes) -> None:
        """The answer to the client's protocol ping."""
        self._put(pong_bytes(payload))

    def close(self, code: CloseCode, detail: str) -> None:
        """A close frame; the client's own ends the connection, or the linger time does."""
        self._end(close_frame(code.code, detail))


_COMMENT: Final = b":\n\n"


class EventStreamOutlet(SocketOutlet):
    """Server-sent events as chunks of one HTTP response. The event's id is the cursor, its data the frame."""

    __slots__ = ("_chunked", "on_closed")

    def __init__(self, transport: asyncio.Transport, flusher: Flusher, wheel: Wheel, *, chunked: bool = True) -> None:
        super().__init__(transport, flusher, wheel)
        self._chunked = chunked
        self.on_closed: Callable[[], None] | None = None

    def send(self, frame: bytes, epoch: bytes = b"", seq: int = 0) -> None:
        """One event. A line break in stored JSON is blank space: it must not end the event's data."""
        if b"\n" in frame or b"\r" in frame:
            frame = frame.replace(b"\r", b" ").replace(b"\n", b" ")
        if epoch:
            self._put(b"id: %b.%d\ndata: " % (epoch, seq), frame, b"\n\n")
        else:
            self._put(b"data: ", frame, b"\n\n")

    def ping(self) -> bool:
        """A comment: it keeps proxies from closing an idle stream, and has no answer."""
        self._put(_COMMENT)
        return False

    def _wrap(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def close(self, code: CloseCode, detail: str) -> None:
        """A last event `close` with the code; the handler then ends the response."""
        last = b'event: close\ndata: {"code":%d,"name":"%b"}\n\n' % (code.code, code.name.encode())
        self._end(last)
        if self.on_closed is not None:
            self.on_closed()
