"""A gateway over a real nats-server, in the test's own loop, and devices that speak its protocol frame by frame."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import aiohttp

from engine.broker.jetstream import Broker, NatsSettings, connect
from engine.topology import server as topology
from gateway.context import Context
from gateway.options import GatewayOptions, Times
from gateway.server import run
from ops.dev.servers import NatsServer
from seamark.protocol.subjects import encode_token, log_stream, log_subject, partition_of
from tests.support.openapi import conforming
from tests.support.tokens import SECRET, token
from tests.support.waiting import ended

PARTITIONS = 4
QUICK = Times(hello_seconds=0.4, ping_seconds=0.4, pong_seconds=0.4)
"""Deadlines for tests that wait for them."""


@dataclass
class Device:
    """A WebSocket client without any cleverness: what it says is what the test says."""

    socket: aiohttp.ClientWebSocketResponse
    frames: list[dict[str, Any]] = field(default_factory=list)

    async def say(self, op: str, **fields: Any) -> None:
        await self.socket.send_json({"op": op, **fields})

    async def next(self, timeout: float = 40.0) -> dict[str, Any]:
        """The next frame; AssertionError with the close code when there is none."""
        message = await self.socket.receive(timeout=timeout)
        assert message.type is aiohttp.WSMsgType.TEXT, f"{message.type.name} {message.data} {message.extra}"
        frame: dict[str, Any] = json.loads(message.data)
        self.frames.append(frame)
        return frame

    async def until(self, op: str, timeout: float = 40.0) -> dict[str, Any]:
        """Read on until a frame `op` has come."""
        async with asyncio.timeout(timeout):
            while True:
                frame = await self.next(timeout)
                if frame["op"] == op:
                    return frame

    async def records(self, count: int, timeout: float = 40.0) -> list[dict[str, Any]]:
        """The next `count` record or skip frames."""
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(timeout):
            while len(found) < count:
                frame = await self.next(timeout)
                if frame["op"] in ("record", "skip"):
                    found.append(frame)
        return found

    async def closed(self, timeout: float = 40.0) -> tuple[int, str]:
        """Code and reason of the server's close frame, whatever comes before it."""
        async with asyncio.timeout(timeout):
            while True:
                message = await self.socket.receive()
                if message.type is aiohttp.WSMsgType.TEXT:
                    self.frames.append(json.loads(message.data))
                elif message.type is aiohttp.WSMsgType.CLOSE:
                    return message.data, message.extra or ""
                elif message.type not in (aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG):
                    raise AssertionError(f"{message.type.name} {message.data}")


@dataclass
class TestGateway:
    """A running gateway."""

    __test__ = False

    port: int
    context: Context
    broker: Broker
    http: aiohttp.ClientSession
    stop: asyncio.Event
    task: asyncio.Task[None]
    nats: NatsServer
    subscriptions: frozenset[int]
    """What its connection to the broker had before there was any client."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def socket(self, **options: Any) -> AsyncIterator[Device]:
        """An open WebSocket that has said nothing."""
        socket = await self.http.ws_connect(f"{self.url}/v1/ws", protocols=("seamark.v1",), **options)
        try:
            yield Device(socket)
        finally:
            await socket.close()

    @asynccontextmanager
    async def device(
        self, user: str = "alice", cursor: str | None = "start", *, tenant: str = "default", name: str = "phone"
    ) -> AsyncIterator[Device]:
        """A device that has said hello."""
        async with self.socket() as device:
            hello = {"token": token(user, tenant), "device": name}
            await device.say("hello", **hello, **({"cursor": cursor} if cursor is not None else {}))
            yield device

    async def append(self, user: str = "alice", count: int = 1, *, tenant: str = "default", body: bytes | None = None,
                     headers: dict[str, str] | None = None) -> list[int]:  # fmt: skip
        """Append records as the dispatcher would; returns their sequences."""
        subject = self.subject(user, tenant)
        seqs = []
        for number in range(count):
            record = body if body is not None else b'{"id":"r%d","kind":"notification"}' % number
            seqs.append((await self.broker.append(subject, record, headers)).seq)
        return seqs

    def partition(self, user: str = "alice", tenant: str = "default") -> int:
        return partition_of(encode_token(tenant), encode_token(user), PARTITIONS)

    def stream(self, user: str = "alice") -> str:
        return log_stream(self.partition(user))

    def subject(self, user: str = "alice", tenant: str = "default") -> str:
        return log_subject(self.partition(user, tenant), tenant, user)

    async def receipts(self) -> list[dict[str, Any]]:
        """All receipts stored so far, in order, with their subject."""
        state = await self.broker.stream("RECEIPTS")
        found = []
        for seq in range(1, state.last_seq + 1):
            answer = await self.broker.api("STREAM.MSG.GET.RECEIPTS", {"seq": seq})
            body = json.loads(base64.b64decode(answer["message"]["data"]))
            found.append({"subject": answer["message"]["subject"], **body})
        return found


@asynccontextmanager
async def again_and_again(say: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
    """Say something beside the body until the gateway hangs up, however often: what a bound allows grows while time passes."""

    async def flood() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await say()
                await asyncio.sleep(0)

    flooding = asyncio.create_task(flood(), name="flood")
    try:
        yield
    finally:
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)


@asynccontextmanager
async def gateway_on(nats: NatsServer, *, topology_ready: bool = False, **options: Any) -> AsyncIterator[TestGateway]:
    """A gateway over `nats`, stopped at the end; a fault of the gateway fails the test.

    It waits longer for PostgreSQL to know a key: on a busy machine the first look-up, which connects, may take its two seconds.
    """
    with patch("gateway.access.api_keys.API_KEY_QUERY_SECONDS", 20.0):
        async with _serving(nats, topology_ready, options) as gateway:
            yield gateway


@asynccontextmanager
async def _serving(nats: NatsServer, topology_ready: bool, options: dict[str, Any]) -> AsyncIterator[TestGateway]:
    settings = NatsSettings(nats.url)
    broker = await connect(settings)
    stop = asyncio.Event()
    if not topology_ready:
        await topology.ensure(broker, "dev")
    started: asyncio.Future[tuple[int, Context]] = asyncio.get_running_loop().create_future()
    given = GatewayOptions(nats=settings, **{"jwt_secret": SECRET, **options})
    serving = run(given, stop=stop, port=0, started=lambda port, context: started.set_result((port, context)))
    task = asyncio.create_task(serving, name="gateway")
    try:
        await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        port, context = started.result()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, middlewares=(conforming,)) as http:
            subscriptions = frozenset(context.broker.nc._subs)
            yield TestGateway(port, context, broker, http, stop, task, nats, subscriptions)
        stop.set()
        async with asyncio.timeout(20):
            await task
    finally:
        await ended(task)
        await broker.close()
