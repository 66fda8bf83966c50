"""`GET /v1/ws`: a session over a WebSocket.

aiohttp shakes hands and reads the client's frames; the session's own frames go straight to the transport.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from typing import Final, cast

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from aiohttp._websocket.models import WSMessageTextBytes
from aiohttp._websocket.reader import WebSocketDataQueue, WebSocketReader
from aiohttp._websocket.writer import WebSocketWriter
from aiohttp.base_protocol import BaseProtocol
from aiohttp.helpers import DEFAULT_CHUNK_SIZE

from gateway.access.admission import admit_session
from gateway.access.auth import bearer
from gateway.carriers.connection import Connection, connection_of
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import Kind, Problem
from gateway.limits import FRAGMENT_BYTES, FRAME_BYTES, ROOM_BYTES, WIRE_BYTES_PER_MINUTE
from gateway.session.frames import ACK_OPENING
from gateway.session.outlet import WebSocketOutlet
from gateway.session.session import Session
from seamark.protocol.close_codes import BAD_FRAME, NORMAL, TOO_LARGE, TOO_MANY_FRAMES
from seamark.protocol.frames import PROTOCOL

UNSUPPORTED_PROTOCOL: Final = Kind(400, "unsupported_protocol")
BAD_HANDSHAKE: Final = Kind(400, "bad_handshake")

# Asked for with each frame: looked up in their class they cost Python 3.11 a tenth of a microsecond.
_TEXT: Final = WSMsgType.TEXT
_PONG: Final = WSMsgType.PONG

_NOTSENT_LOWAT: Final = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)


class _Inbox(WebSocketDataQueue):
    """aiohttp's queue of frames, past which acks and pongs go: they need no coroutine, and are nearly all that clients send.

    A frame through the queue wakes a future, the handler's task and two coroutines: 8 us, of which these two need none.
    """

    __slots__ = ("_flooded", "_waiting", "frames", "session")

    def __init__(self, protocol: BaseProtocol, limit: int, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(protocol, limit, loop=loop)
        self.session: Session | None = None
        self.frames = 0
        """Whole frames that have come."""
        self._waiting = self._flooded = False

    def wait(self, session: Session) -> None:
        """The handler of `session` is done with what came so far, and waits for the next frame that takes the queue."""
        self.session = session
        self._waiting = not self._buffer
        if self._flooded:
            self.flooded()

    def flooded(self) -> None:
        """The client has sent more bytes than its frames can have: end its session, now or as soon as there is one."""
        self._flooded = True
        if self.session is not None:
            self.session.end(TOO_MANY_FRAMES, "the client sent more bytes than the frames it may send")

    def feed_data(self, data: WSMessage | WSMessageTextBytes, size: int) -> None:
        """Called by aiohttp's reader for every whole frame, in order."""
        self.frames += 1
        session = self.session
        if self._waiting and session is not None:
            try:
                kind = data.type
                if kind is _TEXT and data.data.startswith(ACK_OPENING):
                    session.receive(data.data)
                    return
                if kind is _PONG:
                    session.heard()
                    return
            except Exception as error:
                session.failed(error)
                return
            self._waiting = False
        super().feed_data(data, size)


class _Inflow:
    """Passes what a client sends to aiohttp's parser, within bounds that fragments do not escape.

    A session bounds whole frames. A fragment costs the parser as much as a frame, may be empty, and no session hears of it:
    without this class a client could make the parser work through millions of them a second.
    """

    __slots__ = ("_bytes", "_inbox", "_parser", "_since", "_unframed")

    def __init__(self, parser: WebSocketReader, inbox: _Inbox) -> None:
        self._parser = parser
        self._inbox = inbox
        self._unframed = 0  # bytes since the last whole frame; -1: everything else is ignored
        self._bytes = 0  # since `_since`
        self._since = time.monotonic()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Called by the connection with everything that comes. The parser's own answer: whether it has ended."""
        if self._unframed < 0:
            return False, b""
        frames, size = self._inbox.frames, len(data)
        answer = self._parser.feed_data(data)
        self._unframed = self._unframed + size if self._inbox.frames == frames else 0
        self._bytes += size
        if self._unframed > FRAGMENT_BYTES or (self._bytes > WIRE_BYTES_PER_MINUTE and not self._begin_minute(size)):
            self._unframed = -1
            self._inbox.flooded()
        return answer

    def _begin_minute(self, size: int) -> bool:
        now = time.monotonic()
        if now - self._since < 60:
            return False
        self._since, self._bytes = now, size
        return True

    def feed_eof(self) -> None:
        """The connection is lost."""
        self._parser.feed_eof()


class _Socket(web.WebSocketResponse[bool]):
    """aiohttp's reader without its way of closing, which knows no code of ours and waits 10 s for the client."""

    inbox: _Inbox

    def _post_start(self, request: web.BaseRequest, protocol: str | None, writer: WebSocketWriter) -> None:
        # As aiohttp's, but for the queue. What came with the handshake is fed here, before there is a session.
        self._ws_protocol, self._writer = protocol, writer
        self._reader = self.inbox = _Inbox(request.protocol, DEFAULT_CHUNK_SIZE, loop=asyncio.get_running_loop())
        self._parser = WebSocketReader(self.inbox, FRAME_BYTES + 1, compress=False, decode_text=False)
        request.protocol.set_parser(cast("WebSocketReader", _Inflow(self._parser, self.inbox)))
        request.protocol.keep_alive(False)

    async def close(self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        """Nothing: the session has written its close frame, or is about to."""
        return False


@Endpoint("GET", "/v1/ws", status=101, opens_session=True, refuses=(UNSUPPORTED_PROTOCOL, BAD_HANDSHAKE))
async def follow_socket(call: Call[None, None, None]) -> web.StreamResponse:
    """Follow a user's log over a WebSocket, in frames of `seamark.v1`; the token may come in its first one."""
    request, context = call.request, call.context
    stream = _Socket(
        protocols=(PROTOCOL,),
        compress=False,
        max_msg_size=FRAME_BYTES + 1,
        autoping=False,
        autoclose=False,
        decode_text=False,
    )
    try:
        admit_session(request, context)
        _check_protocol(request)
        await stream.prepare(request)
    except Problem as problem:
        return problem.response(request, follow_socket.path)
    except web.HTTPException as error:
        return Problem(BAD_HANDSHAKE, error.text or error.reason).response(request, follow_socket.path)
    session, outlet = _open(request, context)
    try:
        await _receive(stream, session, outlet, connection_of(request))
    except Exception as error:
        session.failed(error)
    finally:
        session.gone()
        outlet.on_writable = None
    return stream


def _check_protocol(request: web.BaseRequest) -> None:
    """A client that names sub-protocols must name ours; one that names none is taken to mean it."""
    offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", ()))
    if offered and PROTOCOL not in (name.strip() for name in offered.split(",")):
        raise Problem(UNSUPPORTED_PROTOCOL, f"the sub-protocol is {PROTOCOL}")


def _open(request: web.BaseRequest, context: Context) -> tuple[Session, WebSocketOutlet]:
    """A session on the connection of a request that has become a WebSocket.

    Raises:
        ConnectionResetError: the connection was lost during the handshake.
    """
    connection = connection_of(request)
    transport = connection.transport
    if transport is None:
        raise ConnectionResetError
    bound_unsent(transport)
    outlet = WebSocketOutlet(transport, context.flusher, context.wheel)
    session = Session(context, outlet, "ws", bearer(request.headers.get("Authorization")))
    outlet.on_writable = session.writable
    connection.on_writable = outlet.writable
    connection.on_lost = session.gone
    return session, outlet


async def _receive(stream: _Socket, session: Session, outlet: WebSocketOutlet, connection: Connection) -> None:
    """Hand frames to the session until the client has closed or the connection is lost.

    After the session has ended itself this goes on reading, so that the client's half of the handshake is taken from
    the socket: a transport closed with unread bytes resets the connection, and the client would not see the code.
    """
    while True:
        stream.inbox.wait(session)
        message = await stream.receive()
        kind = message.type
        if kind is WSMsgType.TEXT:
            work = session.receive(message.data)
            if work is not None:
                await work
        elif kind is WSMsgType.PONG:
            session.heard()
        elif kind is WSMsgType.PING:
            session.heard()
            outlet.pong(message.data)
        elif kind is WSMsgType.BINARY:
            session.end(BAD_FRAME, "frames are text")
        elif kind is WSMsgType.ERROR:
            too_large = getattr(message.data, "code", None) == WSCloseCode.MESSAGE_TOO_BIG
            if too_large:
                session.end(TOO_LARGE, f"a frame may have {FRAME_BYTES} bytes")
            else:
                session.end(BAD_FRAME, "not a valid WebSocket frame")
            await _lost(connection)
            return
        else:
            session.gone()
            outlet.close(NORMAL, "")
            return


async def _lost(connection: Connection) -> None:
    """The connection's end: by the client, which has our close frame, or by the outlet's linger time."""
    if connection.transport is None:
        return
    lost = asyncio.get_running_loop().create_future()
    connection.on_lost = lambda: None if lost.done() else lost.set_result(None)
    await lost


def bound_unsent(transport: asyncio.Transport) -> None:
    """Let the kernel hold little that is not on the wire yet: a slow socket is seen early, and a ping is not stuck in it."""
    if _NOTSENT_LOWAT is None:
        return
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        raw.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, ROOM_BYTES)
