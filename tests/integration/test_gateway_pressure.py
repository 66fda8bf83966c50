"""Sockets that do not read, processes that leave, clients that trickle."""

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.broker.jetstream import Broker, NatsSettings, Outgoing, connect
from engine.topology import server as topology
from gateway.carriers.connection import Runner
from ops.dev.servers import NatsServer
from seamark.protocol.subjects import encode_token, log_subject, partition_of
from tests.support.gatewayprocess import GatewayProcess, gateway_process
from tests.support.gateways import PARTITIONS, gateway_on
from tests.support.logs import eventually
from tests.support.tokens import SECRET, token

RECORDS = 30_000
BATCH = 1_000
TIMES = {"ping_seconds": 5.0, "pong_seconds": 5.0}


class SlowSocket:
    """A WebSocket client that reads one byte a second."""

    def __init__(self, port: int, hello: dict[str, Any]) -> None:
        self.received = bytearray()
        self.cursor = "start"
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(
            b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        while b"\r\n\r\n" not in self.received:
            self.received += self.socket.recv(1)
        self.received.clear()
        payload = json.dumps(hello).encode()
        head = bytes((0x81, 0x80 | 126, len(payload) >> 8, len(payload) & 0xFF)) if len(payload) > 125 else b""
        assert head
        self.socket.sendall(head + bytes(4) + payload)
        self.socket.setblocking(False)

    async def read(self, until: asyncio.Event) -> None:
        """One byte a second until `until` is set, then as fast as it comes, to the end of the connection."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self.socket, 65_536 if until.is_set() else 1):
                self.received += data
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(until.wait(), 1)

    def seqs(self) -> list[int]:
        """Sequences of the records that have come as a whole; `cursor` is then that of the last of them."""
        found, data = [], bytes(self.received)
        while len(data) >= 4:
            size, start = (int.from_bytes(data[2:4], "big"), 4) if data[1] == 126 else (data[1], 2)
            payload, data = data[start : start + size], data[start + size :]
            if data[:1] and len(payload) == size and payload.startswith(b'{"op":"record"'):
                frame = json.loads(payload)
                found.append(frame["seq"])
                self.cursor = frame["cursor"]
        return found


async def publish(broker: Broker, user: str, received: Callable[[], int]) -> None:
    """Records for one user, in atomic batches with the time of their making in each, as fast as the healthy session has them."""
    partition = partition_of(encode_token("default"), encode_token(user), PARTITIONS)
    subject = log_subject(partition, "default", user)
    for start in range(0, RECORDS, BATCH):
        await eventually(lambda start=start: received() >= start)
        at = time.time()
        body = b'{"id":"r%d","at":%f,"data":{"text":"%b"}}'
        await broker.commit(
            [Outgoing(subject, body % (number, at, b"x" * 120)) for number in range(start, start + BATCH)]
        )


async def receive_all(
    gateway: GatewayProcess,
    cursor: str,
    seqs: list[int],
    delays: list[float],
    live: asyncio.Event | None = None,
) -> None:
    """What a healthy client receives that is there all the time, and when; `live` is set once it is caught up.

    On a busy machine it, too, may answer a ping late that lies behind megabytes of records: then it comes back.
    """
    async with aiohttp.ClientSession() as http:
        for _ in range(5):
            async with http.ws_connect(f"http://127.0.0.1:{gateway.port}/v1/ws") as device:
                await device.send_json({"op": "hello", "token": token(), "device": "fast", "cursor": cursor})
                while len(seqs) < RECORDS:
                    message = await device.receive(timeout=30)
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        break
                    frame = json.loads(message.data)
                    if frame["op"] == "record":
                        seqs.append(frame["seq"])
                        delays.append(time.time() - frame["record"]["at"])
                        cursor = frame["cursor"]
                    elif frame["op"] == "live" and live is not None:
                        live.set()
                else:
                    return
    raise AssertionError("it was sent away five times")


async def scenario(nats: NatsServer, log: Path, *, slow: bool) -> tuple[int, float, list[int]]:
    """Growth of the gateway's memory, longest delay of the healthy session, what the slow one has in the end."""
    broker = await connect(NatsSettings(nats.url))
    try:
        await topology.ensure(broker, "dev")
        with gateway_process(nats.url, log, times=TIMES, options={"jwt_secret": SECRET}) as gateway:
            hello = {"op": "hello", "token": token(), "device": "slow", "cursor": "start"}
            live, seqs, delays = asyncio.Event(), [], []
            healthy = asyncio.create_task(receive_all(gateway, "start", seqs, delays, live), name="healthy")
            slow_socket = SlowSocket(gateway.port, hello) if slow else None
            given_up = asyncio.Event()
            reading = asyncio.create_task(slow_socket.read(given_up), name="slow") if slow_socket is not None else None
            async with asyncio.timeout(30):
                await live.wait()
            if slow_socket is not None:
                await eventually(lambda: slow_socket.received)  # its session stands
            before = gateway.rss_bytes()
            await publish(broker, "alice", lambda: RECORDS if healthy.done() else len(seqs))
            await healthy
            growth = gateway.rss_bytes() - before
            assert seqs == list(range(1, RECORDS + 1))
            resumed: list[int] = []
            longest = max(delays)
            if slow_socket is not None and reading is not None:
                await eventually(lambda: "4408" in log.read_text(), seconds=30)
                given_up.set()
                async with asyncio.timeout(30):
                    await reading
                resumed = slow_socket.seqs()
                await receive_all(gateway, slow_socket.cursor, resumed, delays)
                slow_socket.socket.close()
            return growth, longest, resumed
    finally:
        await broker.close()


@pytest.mark.timeout(180)
async def test_a_socket_that_reads_a_byte_a_second_costs_nearly_nothing_and_loses_nothing(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    second = NatsServer(tmp_path / "second")
    try:
        second.start()
        growth, _, _ = await scenario(second, tmp_path / "without.log", slow=False)
    finally:
        second.kill()
    slow_growth, longest, resumed = await scenario(nats_server, tmp_path / "with.log", slow=True)
    assert resumed == list(range(1, RECORDS + 1))
    assert slow_growth - growth < 2_000_000
    # Had the others waited for the slow one it would be ten seconds, until that is given up; a busy machine may cost a few.
    assert longest < 8.0


# --- processes that pause -------------------------------------------------------------------------------------------


async def test_what_is_in_the_sockets_when_a_stopped_process_goes_on_counts_before_any_deadline_does(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    # Long enough for a slow machine to get to the stop; then the process is stopped for longer still.
    times = {"hello_seconds": 3.5, "ping_seconds": 1.0, "pong_seconds": 3.5}
    broker = await connect(NatsSettings(nats_server.url))
    await topology.ensure(broker, "dev")
    await broker.close()
    options = {"jwt_secret": SECRET}
    with gateway_process(nats_server.url, tmp_path / "log", times=times, options=options) as gateway:
        url = f"http://127.0.0.1:{gateway.port}/v1/ws"
        hello = {"op": "hello", "token": token(), "device": "early", "cursor": "start"}
        async with aiohttp.ClientSession() as http, http.ws_connect(url, autoping=False) as early:
            await early.send_json(hello)
            while (await early.receive(timeout=30)).type is not aiohttp.WSMsgType.PING:
                pass
            async with http.ws_connect(url) as late:
                gateway.process.send_signal(signal.SIGSTOP)
                await early.pong()
                await late.send_json({**hello, "device": "late"})
                await asyncio.sleep(max(times["hello_seconds"], times["pong_seconds"]) + 0.3)
                gateway.process.send_signal(signal.SIGCONT)
                answers = asyncio.create_task(next_frame(early), name="early")
                said = await next_frame(late)
                assert said["op"] == "ready", said
                await early.send_json({"op": "ping"})
                said = await answers
                assert said["op"] == "pong", said


async def next_frame(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    """The next frame of the protocol; pings that come before it are answered."""
    while (said := await socket.receive(timeout=30)).type is aiohttp.WSMsgType.PING:
        await socket.pong(said.data)
    assert said.type is aiohttp.WSMsgType.TEXT, said
    frame: dict[str, Any] = json.loads(said.data)
    return frame


# --- leaving --------------------------------------------------------------------------------------------------------


async def test_draining_tells_every_session_when_to_come_back_and_stores_what_is_under_way(
    nats_server: NatsServer,
) -> None:
    async with gateway_on(nats_server) as gateway, contextlib.AsyncExitStack() as stack:
        devices = [await stack.enter_async_context(gateway.device(f"user{number}")) for number in range(30)]
        for number, device in enumerate(devices):
            await device.until("live")
            await gateway.append(f"user{number}")
            await device.say("ack", cursor=(await device.records(1))[0]["cursor"])
            await device.say("read", all=True)
            await device.say("ping")
            await device.until("pong")  # so the gateway has taken both
        gateway.stop.set()
        hints = []
        for device in devices:
            assert (await device.closed())[0] == 1012
            assert device.frames[-1]["op"] == "bye"
            hints.append(device.frames[-1]["retry_after_ms"])
        assert all(0 < hint <= 5_000 for hint in hints)
        assert len(set(hints)) > 20
        async with asyncio.timeout(30):
            await gateway.task
        with pytest.raises(aiohttp.ClientConnectorError):
            await gateway.http.ws_connect(f"{gateway.url}/v1/ws")
        states = [await gateway.broker.stream(f"LOG-{number}") for number in range(PARTITIONS)]
        assert sum(state.messages for state in states) == 60
        acknowledged = [receipt for receipt in await gateway.receipts() if receipt["state"] == "acknowledged"]
        assert {receipt["user"] for receipt in acknowledged} == {f"user{number}" for number in range(30)}


async def test_a_session_that_does_not_read_cannot_hold_a_leaving_process_up(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=1_000, body=b'{"data":"%b"}' % (b"x" * 4_000))
        hello = {"op": "hello", "token": token(), "device": "slow", "cursor": "start"}
        slow = await asyncio.to_thread(SlowSocket, gateway.port, hello)
        await eventually(lambda: gateway.context.counters.no_room)
        gateway.stop.set()
        async with asyncio.timeout(25):  # by itself it would be given up ten seconds later
            await gateway.task
        slow.socket.close()


# --- clients that trickle -------------------------------------------------------------------------------------------


async def test_a_request_head_that_trickles_is_given_up(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner.__init__, "__kwdefaults__", {"head_seconds": 0.5})
    async with gateway_on(nats_server) as gateway:
        connections = []
        for _ in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(b"GET /v1/ws HTTP/1.1\r\nHost: ")
            connections.append((reader, writer))
        for reader, writer in connections:
            async with asyncio.timeout(20):
                with contextlib.suppress(ConnectionError):  # on a busy machine it is given up before a byte has come
                    assert await reader.read() == b""
            writer.close()

        async def joins() -> bool:
            with contextlib.suppress(aiohttp.ClientError, AssertionError):  # that machine may be as late once more
                async with gateway.device() as device:
                    return bool(await device.until("live"))
            return False

        await eventually(joins)


async def test_one_address_may_make_only_so_many_handshakes(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server, handshakes_per_minute=3) as gateway:
        for _ in range(3):
            async with gateway.device() as device:
                await device.until("live")
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await gateway.http.ws_connect(f"{gateway.url}/v1/ws")
        assert refused.value.status == 429
        assert refused.value.headers is not None
        assert refused.value.headers["Retry-After"] == "60"


async def test_a_full_process_takes_no_more_sessions(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server, sessions_at_most=1) as gateway, gateway.device() as device:
        await device.until("live")
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await gateway.http.ws_connect(f"{gateway.url}/v1/ws")
        assert refused.value.status == 503
