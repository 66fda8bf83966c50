"""One HTTP/2 connection of the simulated APNs: streams, windows, and how faults look there."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, Final, Protocol

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import msgspec

from ops.dev.providers.faults import Answers, Faults, GoesAway, Hangs, Late, NoTls, Resets, ResetsStream, SlowBody

STREAMS_MAX: Final = 1000
"""What Apple allows once a request with a token was accepted; one until then."""

_RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER for no seconds: the kernel sends RST instead of FIN."""


class Refusal(Exception):
    """The push is not accepted. `timestamp`: with 410, since when the device is none, in milliseconds."""

    def __init__(self, status: int, reason: str, timestamp: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        body = {"reason": reason} | ({} if timestamp is None else {"timestamp": timestamp})
        self.body = json.dumps(body).encode()


class Request(msgspec.Struct):
    """What came on one stream."""

    headers: dict[str, str]
    body: bytes = b""


class Owner(Protocol):
    """The simulator, as a connection sees it."""

    faults: Faults
    connections: set[ApnsServerConnection]
    connected: int

    def take(self, request: Request) -> str:
        """Accept a push; its apns-id. Raises Refusal."""


class ApnsServerConnection(asyncio.Protocol):
    """Answers the requests of one connection."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self._http = h2.connection.H2Connection(config)
        self._requests: dict[int, Request] = {}
        self._unsent: dict[int, bytes] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet, and allow one request."""
        self._transport = transport
        self._owner.connections.add(self)
        self._owner.connected += 1
        self._http.local_settings = h2.settings.Settings(
            client=False, initial_values={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1}
        )
        self._http.initiate_connection()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what is under way."""
        self._owner.connections.discard(self)
        for task in self._tasks.values():
            task.cancel()

    def abort(self) -> None:
        """Break the connection off: the other side sees RST."""
        raw = self._transport.get_extra_info("socket")
        if raw is not None:  # else it is closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self._transport.abort()

    def _flush(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._http.data_to_send())

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        try:
            for event in self._http.receive_data(data):
                self._on(event)
        except h2.exceptions.H2Error:
            self._flush()
            self._transport.close()
            return
        self._flush()

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=int(stream_id)):
                self._requests[stream_id] = Request({str(name): str(text) for name, text in event.headers or ()})
            case h2.events.DataReceived(stream_id=int(stream_id)):
                self._http.acknowledge_received_data(event.flow_controlled_length, stream_id)
                if stream_id in self._requests:
                    self._requests[stream_id].body += event.data or b""
            case h2.events.StreamEnded(stream_id=int(stream_id)) if stream_id in self._requests:
                request = self._requests.pop(stream_id)
                task = asyncio.create_task(self._answer(stream_id, request), name=f"apns-stream-{stream_id}")
                self._tasks[stream_id] = task
                task.add_done_callback(lambda _: self._tasks.pop(stream_id, None))
            case h2.events.StreamReset(stream_id=int(stream_id)):
                self._requests.pop(stream_id, None)
                self._unsent.pop(stream_id, None)
                if task_of_stream := self._tasks.get(stream_id):
                    task_of_stream.cancel()
            case h2.events.WindowUpdated():
                for stream_id in tuple(self._unsent):
                    self._send_body(stream_id)
            case _:
                pass

    async def _answer(self, stream_id: int, request: Request) -> None:
        fault = self._owner.faults.next()
        match fault:
            case None | NoTls():
                self._take(stream_id, request)
            case Answers(status=status):
                body = fault.body or (json.dumps({"reason": fault.code}) if fault.code else "")
                self._say(stream_id, status, request, body.encode(), fault.headers)
            case Late(seconds=seconds):
                await asyncio.sleep(seconds)
                self._take(stream_id, request)
            case SlowBody(seconds=seconds):
                self._take(stream_id, request, seconds)
            case Hangs(accepts=accepts) | Resets(accepts=accepts):
                if accepts:
                    self._owner.take(request)
                if isinstance(fault, Resets):
                    self.abort()
            case ResetsStream(refused=refused):
                code = h2.errors.ErrorCodes.REFUSED_STREAM if refused else h2.errors.ErrorCodes.INTERNAL_ERROR
                self._http.reset_stream(stream_id, code)
            case GoesAway(answers=answers):
                self._go_away(stream_id if answers else stream_id - 2)
                if answers:
                    self._take(stream_id, request)
        self._flush()

    def _take(self, stream_id: int, request: Request, pause_seconds: float = 0.0) -> None:
        try:
            self._owner.take(request)
        except Refusal as refusal:
            self._say(stream_id, refusal.status, request, refusal.body, {}, pause_seconds)
            return
        if self._http.local_settings.max_concurrent_streams < STREAMS_MAX:
            self._http.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_MAX})
        self._say(stream_id, 200, request, b"", {})

    def _say(
        self,
        stream_id: int,
        status: int,
        request: Request,
        body: bytes,
        more: dict[str, str],
        pause_seconds: float = 0.0,
    ) -> None:
        headers = [(":status", str(status)), ("apns-id", request.headers.get("apns-id", ""))]
        headers += [(name.lower(), text) for name, text in more.items()]
        self._http.send_headers(stream_id, headers, end_stream=not body)
        if body and pause_seconds:
            task = asyncio.create_task(self._dribble(stream_id, body, pause_seconds), name=f"apns-body-{stream_id}")
            self._tasks[-stream_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(-stream_id, None))
        elif body:
            self._unsent[stream_id] = body
            self._send_body(stream_id)
        self._flush()

    def _send_body(self, stream_id: int) -> None:
        """Send a body as soon as the windows have room for all of it: a client that never says what it has read gets no more."""
        body = self._unsent[stream_id]
        if self._http.local_flow_control_window(stream_id) >= len(body):
            del self._unsent[stream_id]
            self._http.send_data(stream_id, body, end_stream=True)

    async def _dribble(self, stream_id: int, body: bytes, pause_seconds: float) -> None:
        for index in range(len(body)):
            self._http.send_data(stream_id, body[index : index + 1], end_stream=index == len(body) - 1)
            self._flush()
            await asyncio.sleep(pause_seconds)

    def _go_away(self, last_stream_id: int) -> None:
        """Say GOAWAY without ending the connection, which h2 cannot: it would answer nothing any more."""
        self._flush()
        payload = struct.pack("!II", max(last_stream_id, 0), 0)
        self._transport.write(struct.pack("!I", len(payload))[1:] + b"\x07\x00" + bytes(4) + payload)
