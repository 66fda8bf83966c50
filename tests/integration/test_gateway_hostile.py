"""What a client may do to a gateway without being one: bytes that are no frames, requests that are none, too many of all."""

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engine.broker.jetstream import NatsSettings, connect
from engine.topology import server as topology
from gateway.health import not_ready
from ops.dev.servers import NatsServer
from tests.support.gatewayprocess import gateway_process
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually, of_clients
from tests.support.tokens import SECRET, token

HANDSHAKE = (
    b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
FIRST = b"\x01\x80" + bytes(4)
"""The beginning of a text message: an empty fragment, masked."""
EMPTY = b"\x00\x80" + bytes(4)
"""An empty fragment that goes on with it."""


async def opened(gateway: TestGateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def close_code(reader: asyncio.StreamReader) -> int:
    """The code of the close frame that the gateway ends a WebSocket with."""
    async with asyncio.timeout(30):
        while True:
            head = await reader.readexactly(2)
            size = head[1] if head[1] < 126 else int.from_bytes(await reader.readexactly(2), "big")
            payload = await reader.readexactly(size)
            if head[0] == 0x88:
                return int.from_bytes(payload[:2], "big")


async def test_fragments_without_end_end_the_session_before_they_cost_anything(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        reader, writer = await opened(gateway)
        writer.write(FIRST)

        async def flood() -> int:
            sent = 0
            try:
                while True:
                    writer.write(EMPTY * 10_000)
                    await writer.drain()
                    sent += 10_000
            except ConnectionError:
                return sent

        flooding = asyncio.create_task(flood(), name="flood")
        assert await close_code(reader) == 4429
        await flooding  # the connection is given up though the client does not answer
        await eventually(lambda: not len(gateway.context.sessions))


async def test_a_message_in_many_fragments_is_taken(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        reader, writer = await opened(gateway)
        hello = json.dumps({"op": "hello", "token": token(), "device": "d", "cursor": "start"}).encode()
        pieces = [bytes((0x00, 0x80 | 1)) + bytes(4) + hello[i : i + 1] for i in range(1, len(hello))]
        writer.write(bytes((0x01, 0x80 | 1)) + bytes(4) + hello[:1] + b"".join(pieces) + b"\x80\x80" + bytes(4))
        head = await reader.readexactly(2)
        assert head[0] == 0x81
        assert b'"op":"ready"' in await reader.readexactly(126 if head[1] < 126 else 128)
        writer.close()


async def test_bytes_of_a_minute_are_bounded_whatever_they_make_up(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.carriers.ws.WIRE_BYTES_PER_MINUTE", 200_000)
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        for _ in range(4):
            await device.socket.send_str('{"op":"ping"}'.ljust(60_000))
        assert (await device.closed())[0] == 4429


MALFORMED = {
    "no HTTP": (b"\x16\x03\x01\x02\x00 secret-token\r\n\r\n", 400),
    "a header that is none": (b"GET / HTTP/1.1\r\nAuthorization: Bearer secret-token\x00\x01\r\n\r\n", 400),
    "two lengths": (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: secret-token\r\n\r\n", 400),
    "a header that is too long": (
        b"GET /v1/ws HTTP/1.1\r\nAuthorization: Bearer secret-token" + b"x" * 20_000 + b"\r\n\r\n", 431,
    ),
    "a path that is too long": (b"GET /secret-token" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 431),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_request_is_answered_and_logged_in_one_line_that_quotes_nothing_of_it(
    nats_server: NatsServer, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    request, status = MALFORMED[case]
    async with gateway_on(nats_server) as gateway:
        with capture_logs() as lines:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(request)
            async with asyncio.timeout(20):
                answer = await reader.read()
            writer.close()
    assert answer.split(b" ")[1] == b"%d" % status
    assert b"aiohttp" not in answer
    assert b"application/problem+json" in answer
    assert [line["event"] for line in of_clients(lines)] == ["request_refused"]
    for text in (answer.decode(), str(lines), caplog.text):
        assert "secret" not in text
    assert "Traceback" not in caplog.text


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for one in opened:
        one.close()


async def test_a_process_without_file_descriptors_says_so_and_is_not_ready_until_some_are_free(
    nats_server: NatsServer, connections: list[socket.socket], tmp_path: Path
) -> None:
    broker = await connect(NatsSettings(nats_server.url))
    await topology.ensure(broker, "dev")
    await broker.close()
    log = tmp_path / "log"
    with gateway_process(nats_server.url, log, options={"jwt_secret": SECRET}) as gateway:
        pid = gateway.process.pid
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())) + 20, hard))
        connections.extend(socket.create_connection(("127.0.0.1", gateway.port), timeout=5) for _ in range(40))
        await eventually(lambda: "out_of_file_descriptors" in log.read_text())
        assert log.read_text().count("out_of_file_descriptors") == 1
        while connections:
            connections.pop().close()
        await eventually(lambda: "file_descriptors_free_again" in log.read_text())


async def test_a_process_without_file_descriptors_is_not_ready(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await eventually(lambda: not not_ready(gateway.context))
        gateway.context.descriptors.exhausted = True
        assert not_ready(gateway.context) == ["out of file descriptors"]
        gateway.context.descriptors.look()
        assert not not_ready(gateway.context)


async def test_a_flood_of_malformed_requests_holds_up_no_session(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        waited = []
        for _ in range(5):
            for _ in range(100):
                _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                writer.write(b"nonsense\r\n\r\n")
                writer.close()
            began = time.monotonic()
            await gateway.append()
            await device.records(1)
            waited.append(time.monotonic() - began)
            if waited[-1] < 2:
                return  # a longer one may be due to the machine, once
        raise AssertionError(f"a record took {waited} s")
