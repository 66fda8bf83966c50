"""Devices: one lean process that is thousands of them (raw RFC 6455), so that the client side of a benchmark stays cheap.

`python -m bench.swarm '<settings as JSON>'`; orders come as JSON lines, facts go out as JSON lines. A device checks the
chain of every frame (`prev` is the sequence it holds), so that a loss, a repetition or a wrong order is seen at once.
"""

import asyncio
import base64
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jwt
import msgspec
import uvloop

from bench.load import TENANT, user_name
from bench.machine import raise_file_limit
from bench.processes import commands, say

ACK_SECONDS = 0.25
"""A device acks at once, but no more than four times a second: the coalescing of the SDKs."""
ACK_TICK_SECONDS = 0.025
STEP_SECONDS = 0.0002
"""Resolution of latencies: they are counted in buckets of this width."""
SLOTS_PER_SECOND = round(1 / STEP_SECONDS)

_RECORD = b'{"op":"record","seq":'
_LIVE = b'{"op":"live"'
_READY = b'{"op":"ready"'
_RESET = b'{"op":"reset"'
_ERROR = b'{"op":"error"'


class Settings(msgspec.Struct):
    """What a swarm is told at its start.

    Args:
        port: of the gateway on this machine.
        first, count: the users it plays, one device each.
        secret: signs their tokens; empty: bare handshakes, nothing is said afterwards.
        acks: whether devices acknowledge.
        connecting: sockets that shake hands at a time.
    """

    port: int
    first: int
    count: int
    secret: str = ""
    acks: bool = True
    connecting: int = 256


class Swarm:
    """All devices and what they have seen."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.delivered = 0
        self.chain_breaks = 0
        self.closed = 0
        self.errors: Counter[str] = Counter()
        self.latencies: Counter[int] = Counter()
        self.joins: Counter[int] = Counter()
        self.handshakes: Counter[int] = Counter()
        self.first_at = self.last_at = 0.0
        self.wanted = 0
        self.reached = asyncio.Event()
        self.owing: set[Device] = set()
        self.slots = asyncio.Semaphore(settings.connecting)
        self.devices = [Device(self, settings.first + number) for number in range(settings.count)]

    def count(self, now: float, number: int) -> None:
        """`number` records arrived now."""
        if not self.delivered:
            self.first_at = now
        self.last_at = now
        self.delivered += number
        if self.delivered >= self.wanted > 0:
            self.reached.set()

    def forget(self) -> None:
        """Begin a measurement."""
        self.delivered = self.chain_breaks = 0
        self.latencies.clear()
        self.joins.clear()
        self.handshakes.clear()
        self.first_at = self.last_at = 0.0
        self.wanted = 0
        self.reached.clear()

    def facts(self) -> dict[str, Any]:
        """What was seen since `forget`."""
        return {
            "delivered": self.delivered,
            "chain_breaks": self.chain_breaks,
            "closed": self.closed,
            "errors": dict(self.errors),
            "first_at": self.first_at,
            "last_at": self.last_at,
            "latencies": sorted(self.latencies.items()),
            "joins": sorted(self.joins.items()),
            "handshakes": sorted(self.handshakes.items()),
        }

    async def tend_acks(self) -> None:
        """Send the acks that were too early when their records came."""
        while True:
            await asyncio.sleep(ACK_TICK_SECONDS)
            due = time.time() - ACK_SECONDS
            for device in [device for device in self.owing if device.acked_at <= due]:
                device.ack()


class Device(asyncio.Protocol):
    """One device: its socket, its cursor, its place in the chain."""

    __slots__ = (
        "_buffer",
        "_open",
        "acked_at",
        "begun_at",
        "epoch",
        "hello_at",
        "live",
        "number",
        "seq",
        "swarm",
        "token",
        "transport",
    )

    def __init__(self, swarm: Swarm, number: int) -> None:
        self.swarm = swarm
        self.number = number
        self.token = _token(swarm.settings.secret, number)
        self.transport: asyncio.Transport | None = None
        self.epoch = b""
        self.seq = b""
        self.acked_at = 0.0
        self.begun_at = self.hello_at = 0.0
        self.live: asyncio.Future[None] | None = None
        self._buffer = b""
        self._open = False

    # --- the connection ----------------------------------------------------------------------------------------------

    async def connect(self, cursor: str | None = None) -> None:
        """Shake hands and join the log; returns once live (bare: once the handshake is answered).

        Args:
            cursor: instead of the one it holds.
        """
        loop = asyncio.get_running_loop()
        async with self.swarm.slots:
            self._buffer, self._open, self.live = b"", False, loop.create_future()
            if cursor is not None:
                self.epoch, _, self.seq = cursor.encode().partition(b".")
            self.begun_at = time.time()
            await loop.create_connection(lambda: self, "127.0.0.1", self.swarm.settings.port)
            await self.live

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        key = base64.b64encode(os.urandom(16))
        transport.write(
            b"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: seamark.v1\r\nSec-WebSocket-Key: %b\r\n\r\n" % key
        )

    def connection_lost(self, exc: BaseException | None) -> None:
        self.transport = None
        self.swarm.owing.discard(self)
        if self.live is not None and not self.live.done():
            self.live.set_exception(ConnectionError(f"device {self.number} lost its connection before it was live"))

    def drop(self) -> None:
        """As a network does it: no close frame."""
        self.swarm.owing.discard(self)
        if self.transport is not None:
            self.transport.abort()
            self.transport = None

    def _hello(self) -> None:
        cursor = (
            b',"cursor":"%b.%b"' % (self.epoch, self.seq) if self.epoch else b',"cursor":"start"' if self.seq else b""
        )
        self.hello_at = time.time()
        self._send(b'{"op":"hello","token":"%b","device":"phone"%b}' % (self.token, cursor))

    def _send(self, payload: bytes, opcode: int = 1) -> None:
        # A mask of zeros is a mask: the server does the work of unmasking, and nothing is spent here.
        size = len(payload)
        head = (
            bytes((0x80 | opcode, 0x80 | size))
            if size < 126
            else b"%c\xfe%b" % (0x80 | opcode, size.to_bytes(2, "big"))
        )
        if self.transport is not None:
            self.transport.write(head + b"\0\0\0\0" + payload)

    def ack(self) -> None:
        """Acknowledge all that has come."""
        self.swarm.owing.discard(self)
        self.acked_at = time.time()
        self._send(b'{"op":"ack","cursor":"%b.%b"}' % (self.epoch, self.seq))

    # --- what comes --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        position = 0
        if not self._open:
            position = self._shaken(data)
            if not position:
                return
        end, records = len(data), 0
        while end - position >= 2:
            size, body = data[position + 1], position + 2
            if size == 126:
                size, body = int.from_bytes(data[body : body + 2], "big"), body + 2
            elif size == 127:
                size, body = int.from_bytes(data[body : body + 8], "big"), body + 8
            stop = body + size
            if stop > end or body > end:
                break
            if data.startswith(_RECORD, body):
                records += self._record(data, body, stop)
            else:
                self._other(data[position] & 0x0F, data[body:stop])
            position = stop
        self._buffer = data[position:]
        if records:
            now = time.time()
            self.swarm.count(now, records)
            if self.swarm.settings.acks:
                if now - self.acked_at >= ACK_SECONDS:
                    self.ack()
                else:
                    self.swarm.owing.add(self)

    def _shaken(self, data: bytes) -> int:
        """Where frames begin, 0 while the handshake's answer is not whole."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = data
            return 0
        if not data.startswith(b"HTTP/1.1 101"):
            self.swarm.errors[data[:40].decode(errors="replace")] += 1
            self.drop()
            return 0
        self._open = True
        self.swarm.handshakes[int((time.time() - self.begun_at) * SLOTS_PER_SECOND)] += 1
        if self.swarm.settings.secret:
            self._hello()
        else:
            self._is_live()
        return end + 4

    def _record(self, data: bytes, body: int, stop: int) -> int:
        start = body + len(_RECORD)
        comma = data.index(b",", start)
        seq = data[start:comma]
        if not data.startswith(self.seq + b",", comma + 8):  # ,"prev":
            self.swarm.chain_breaks += 1
        self.seq = seq
        due = data.find(b'"due":', comma, stop)
        if due > 0:
            moment = float(data[due + 6 : data.index(b",", due, stop)])
            if moment:
                self.swarm.latencies[int((time.time() - moment) * SLOTS_PER_SECOND)] += 1
        return 1

    def _other(self, opcode: int, payload: bytes) -> None:
        if opcode == 9:
            self._send(payload, 10)
        elif opcode == 8:
            self.swarm.closed += 1
            self.swarm.errors[
                f"close {int.from_bytes(payload[:2], 'big')} {payload[2:80].decode(errors='replace')}"
            ] += 1
        elif payload.startswith((_LIVE, _READY, _RESET)):
            cursor = msgspec.json.decode(payload).get("cursor")
            if cursor is not None:
                self.epoch, _, self.seq = cursor.encode().partition(b".")
            if payload.startswith(_LIVE):
                self._is_live()
        elif payload.startswith(_ERROR):
            self.swarm.errors[payload.decode(errors="replace")[:100]] += 1

    def _is_live(self) -> None:
        if self.live is not None and not self.live.done():
            if self.hello_at:
                self.swarm.joins[int((time.time() - self.hello_at) * SLOTS_PER_SECOND)] += 1
            self.live.set_result(None)


def _token(secret: str, number: int) -> bytes:
    if not secret:
        return b""
    claims = {"sub": user_name(number), "tenant": TENANT, "exp": int(time.time()) + 86_400}
    return jwt.encode(claims, secret, algorithm="HS256").encode()


async def _connect(swarm: Swarm, devices: Iterable[Device], cursor: str | None, seconds: float) -> None:
    """Connect all; says how long it took until the last was live."""
    started = time.time()
    failures: Counter[str] = Counter()
    async with asyncio.timeout(seconds):
        for outcome in await asyncio.gather(*(device.connect(cursor) for device in devices), return_exceptions=True):
            if isinstance(outcome, BaseException):
                failures[f"{type(outcome).__name__}: {outcome}"[:120]] += 1
    say("connected", seconds=time.time() - started, failures=dict(failures.most_common(5)), **swarm.facts())


async def _expect(swarm: Swarm, total: int, seconds: float) -> None:
    """Wait for so many records since `forget`; says what came, in time or not."""
    swarm.wanted = total
    if swarm.delivered < total:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await swarm.reached.wait()
    say("delivered", **swarm.facts())


async def _main() -> None:
    raise_file_limit()
    swarm = Swarm(msgspec.json.decode(sys.argv[1], type=Settings))
    acks = asyncio.create_task(swarm.tend_acks(), name="acks")
    waiting: set[asyncio.Task[None]] = set()
    say("ready")
    async for order in commands():
        do = order.pop("do")
        if do == "connect":
            chosen = swarm.devices[order.get("first", 0) : order.get("last", len(swarm.devices))]
            swarm.slots = asyncio.Semaphore(order.get("at_a_time", swarm.settings.connecting))
            await _connect(swarm, chosen, order.get("cursor"), order["seconds"])
        elif do == "expect":
            task = asyncio.create_task(_expect(swarm, order["total"], order["seconds"]), name="expect")
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        elif do == "forget":
            swarm.forget()
            say("forgotten")
        elif do == "drop":
            for device in swarm.devices[order.get("first", 0) : order.get("last", len(swarm.devices))]:
                device.drop()
            say("dropped")
        elif do == "cursors":
            say("cursors", cursors=[f"{device.epoch.decode()}.{device.seq.decode()}" for device in swarm.devices])
    acks.cancel()


if __name__ == "__main__":
    uvloop.run(_main())
