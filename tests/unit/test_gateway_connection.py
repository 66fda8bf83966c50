"""The gateway's connections: an answer that nobody reads is not held for ever."""

import asyncio
import contextlib
import socket

import pytest
from aiohttp import web

from gateway.carriers.connection import Runner, connection_of

LARGE = bytes(32 << 20)


async def serve(lost: asyncio.Event) -> tuple[Runner, int]:
    async def handler(request: web.Request) -> web.Response:
        connection_of(request).on_lost = lost.set
        return web.Response(body=LARGE)

    app = web.Application()
    app.router.add_get("/", handler)
    runner = Runner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, site.port


async def client(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return sock


async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.carriers.connection.ANSWER_STUCK_SECONDS", 0.2)
    lost = asyncio.Event()
    runner, port = await serve(lost)
    with await client(port):
        async with asyncio.timeout(20):
            await lost.wait()
    await runner.cleanup()


async def test_an_answer_that_is_read_slowly_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.carriers.connection.ANSWER_STUCK_SECONDS", 0.2)
    runner, port = await serve(asyncio.Event())
    for _ in range(3):
        if await read_slowly(port) > len(LARGE):
            break  # else this machine may have stood still for as long, once
    else:
        pytest.fail("it was cut off, three times")
    await runner.cleanup()


async def read_slowly(port: int) -> int:
    """How many bytes have come."""
    loop, received = asyncio.get_running_loop(), 0
    with await client(port) as sock, contextlib.suppress(ConnectionError):
        async with asyncio.timeout(30):
            while data := await loop.sock_recv(sock, 1 << 20):
                received += len(data)
                await asyncio.sleep(0.002)
    return received
