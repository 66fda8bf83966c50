"""One WebSocket to the gateway, from `hello` to its end. Reconnecting is the business of `connection.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from yarl import URL

from seamark.backoff import retry_after_seconds
from seamark.client.receiver import Joined, Notice, Outcome, Receiver, Restart
from seamark.protocol.close_codes import CODE_OF_STATUS
from seamark.protocol.errors import BadFrame, UnknownOp
from seamark.protocol.frames import (
    PROTOCOL,
    Bye,
    ClientFrame,
    ErrorFrame,
    GatewayFrame,
    Hello,
    Ping,
    decode_gateway_frame,
    encode,
)

log = logging.getLogger("seamark.client")

CHAIN_BROKEN: Final = 4000
"""The code this client closes with when it resumes because of what it received."""

FRAME_BYTES_MAX: Final = 32 * 1024 * 1024
"""Largest frame taken from the gateway: an event is at most 1 MiB, a reset carries a page of the inbox."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of a connection, in seconds.

    Attributes:
        connect_seconds: TCP, TLS and the handshake.
        hello_seconds: from `hello` to `ready`.
        send_seconds: one frame into the socket.
        ping_seconds: a `ping` is sent this often; it also brings the position of an idle log.
        silence_seconds: nothing at all received for so long means the way is dead. More than two pings.
        ack_seconds: at most one `ack`, and one turn of new read marks, in this time; the protocol asks for 0.25.
        mark_seconds: a read mark that the log has not shown after one to two of these is said again.
    """

    connect_seconds: float = 10.0
    hello_seconds: float = 10.0
    send_seconds: float = 10.0
    ping_seconds: float = 20.0
    silence_seconds: float = 50.0
    ack_seconds: float = 0.25
    mark_seconds: float = 15.0


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended: close code, what was said, and how long the gateway asked to stay away.

    `token_sent`: the gateway was given the token, so a 4401 may be about the token.
    """

    code: int
    reason: str
    retry_after_seconds: float | None = None
    token_sent: bool = False


def endpoint(url: str) -> str:
    """The WebSocket address for `url`, which may be the gateway's base address or the endpoint itself."""
    parsed = URL(url)
    if parsed.scheme not in ("http", "https", "ws", "wss") or not parsed.host:
        raise ValueError(f"not a gateway address: {url!r}; write it like https://notify.example.com")
    if parsed.path.rstrip("/").endswith("/v1/ws"):
        return str(parsed)
    return str(parsed / "v1/ws")


class Session:
    """Runs one WebSocket.

    Args:
        receiver: decides on every frame; outlives the session.
        handle: is given each outcome but Restart, in order, and is awaited: the socket is read no faster.
        timing: the deadlines.
    """

    def __init__(self, receiver: Receiver, handle: Callable[[Outcome], Awaitable[None]], timing: Timing) -> None:
        self._receiver = receiver
        self._handle = handle
        self._timing = timing
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._retry_after_seconds: float | None = None
        self._said = ""
        self._token_sent = False

    async def run(
        self, http: aiohttp.ClientSession, url: str, hello: Hello, tending: list[Coroutine[Any, Any, None]]
    ) -> End:
        """Connect, say hello and receive until the end. Never raises for what the network or the gateway does.

        Args:
            http: the client to connect with.
            url: of the gateway's `/v1/ws`.
            hello: the first frame; the token is there, never in the URL.
            tending: coroutines to run beside the receiving (acks, refresh); cancelled at the end.
        """
        tasks: list[asyncio.Task[None]] = []
        try:
            ws = await self._connect(http, url)
            if isinstance(ws, End):
                return ws
            self._ws = ws
            self._receiver.connected()
            tasks = [asyncio.create_task(one, name="seamark-tend") for one in (*tending, self._ping())]
            self._token_sent = await self.send(hello)
            return await self._receive(ws)
        finally:
            await _cancel(tasks)
            for one in tending:
                one.close()  # where the connection failed they were never started
            if self._ws is not None:
                await self._close(self._ws)

    async def _connect(self, http: aiohttp.ClientSession, url: str) -> aiohttp.ClientWebSocketResponse | End:
        try:
            async with asyncio.timeout(self._timing.connect_seconds):
                return await http.ws_connect(
                    url,
                    protocols=(PROTOCOL,),
                    max_msg_size=FRAME_BYTES_MAX,
                    compress=0,
                    timeout=aiohttp.ClientWSTimeout(ws_close=2.0),
                )
        except aiohttp.WSServerHandshakeError as refused:
            said = f"the handshake was answered with {refused.status}"
            return End(CODE_OF_STATUS.get(refused.status, 1006), said, retry_after_seconds(refused.headers))
        except (aiohttp.ClientError, OSError, TimeoutError) as failed:
            return End(1006, f"no connection: {str(failed) or type(failed).__name__}")

    async def _receive(self, ws: aiohttp.ClientWebSocketResponse) -> End:
        silence = self._timing.hello_seconds
        while True:
            try:
                async with asyncio.timeout(silence):
                    message = await ws.receive()
            except TimeoutError:
                return End(1006, f"nothing was received for {silence:g} s")
            if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return self._end(ws, message)
            try:
                frame = decode_gateway_frame(message.data)
            except UnknownOp:
                continue
            except BadFrame as wrong:
                return End(CHAIN_BROKEN, str(wrong))
            outcome = self._decide(frame)
            if isinstance(outcome, Restart):
                return End(CHAIN_BROKEN, outcome.why)
            if isinstance(outcome, Joined):
                silence = self._timing.silence_seconds
            await self._handle(outcome)

    def _decide(self, frame: GatewayFrame) -> Outcome:
        outcome = self._receiver.on(frame)
        if isinstance(outcome, Notice):
            if isinstance(outcome.frame, Bye):
                self._retry_after_seconds = outcome.frame.retry_after_ms / 1000
            elif isinstance(outcome.frame, ErrorFrame):
                self._said = f"{outcome.frame.code}: {outcome.frame.detail}"
                log.warning("the gateway reports an error: %s", self._said)
        return outcome

    def _end(self, ws: aiohttp.ClientWebSocketResponse, message: aiohttp.WSMessage) -> End:
        code = ws.close_code or 1006
        said = message.extra if isinstance(message.extra, str) else ""
        if message.type is aiohttp.WSMsgType.ERROR:
            said = said or str(message.data)
        return End(code, said or self._said, self._retry_after_seconds, self._token_sent)

    async def send(self, frame: ClientFrame) -> bool:
        """Send one frame. False if it cannot be: then the connection is ended, and the receiving side reports it."""
        ws = self._ws
        if ws is None or ws.closed:
            return False
        try:
            async with asyncio.timeout(self._timing.send_seconds):
                await ws.send_str(encode(frame).decode())
        except (aiohttp.ClientError, OSError, TimeoutError) as failed:
            log.debug("a frame could not be sent: %s", failed)
            await self._close(ws)
            return False
        return True

    async def leave(self) -> None:
        """End the connection; the receiving side reports it."""
        if self._ws is not None:
            await self._close(self._ws)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._timing.ping_seconds)
            await self.send(Ping())

    async def _close(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(3.0):
                await ws.close()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            log.error("a task of the connection failed", exc_info=result)
