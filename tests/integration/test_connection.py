"""A real nats-server falls silent, hangs up or is not there: the connection outlives it and leaks nothing."""

import asyncio
import contextlib
import time
from pathlib import Path

import nats.errors
import pytest

from engine.broker import connection
from engine.broker.client import EngineClient
from engine.broker.jetstream import NatsSettings, connect
from engine.errors import Unanswered, Unavailable
from ops.dev.servers import HOST, NatsServer
from tests.support.hangingup import HangingUp
from tests.support.inbox import Inbox, back
from tests.support.logs import connected, eventually


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_INTERVAL_SECONDS", 0.2)


async def test_an_error_for_which_the_server_hangs_up_costs_a_reconnect_only(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        inbox = Inbox(broker, "a")
        broker.write(b"PUB a %d\r\n" % (nats_server.max_payload_bytes + 1))  # 'Maximum Payload Violation'
        await eventually(lambda: broker.nc.stats["reconnects"] == 1)
        broker.write(b"NONSENSE\r\n")  # 'Unknown Protocol Operation'
        await eventually(lambda: broker.nc.stats["reconnects"] == 2)
        await back(broker)
        broker.publish("a", b"x")
        await inbox.got(b"x")


async def test_a_silent_server_is_noticed_within_ten_seconds_and_another_one_is_taken(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    other = NatsServer(tmp_path / "other")
    try:
        other.start()
        async with connected(f"{nats_server.url},{other.url}") as broker:
            inbox = Inbox(broker, "a")
            await broker.flush()
            for _ in range(3):  # a machine that stands still for a while may take longer, but not each time
                first, second = (
                    (nats_server, other) if broker.nc.connected_url.port == nats_server.port else (other, nats_server)
                )
                started = time.monotonic()
                first.suspend()
                # More than the kernel takes for a peer that does not read: closing in good order would never end.
                broker.write(b"PUB b 8000000\r\n" + bytes(8_000_000))
                await eventually(lambda port=second.port: broker.connected and broker.nc.connected_url.port == port)
                took = time.monotonic() - started
                broker.publish("a", b"x")
                await inbox.got(b"x")
                if took < 13:
                    break
                first.resume()
            assert took < 13
    finally:
        other.kill()


async def test_a_server_that_wakes_up_is_taken_again_and_no_attempt_in_between_leaks_a_socket(
    nats_server: NatsServer, quick_pings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(nats_server.url) as broker:
        monkeypatch.setitem(broker.nc.options, "connect_timeout", 0.1)
        inbox = Inbox(broker, "a")
        waiting = asyncio.create_task(broker.request("a", timeout_seconds=30), name="request")
        await back(broker)
        before = sockets()
        nats_server.suspend()
        with pytest.raises(Unanswered, match="lost"):
            await waiting
        await eventually(lambda: broker.nc._server_pool[0].reconnects >= 8)
        await eventually(lambda: sockets() <= before + 1)
        nats_server.resume()
        await back(broker)
        await eventually(lambda: sockets() <= before)
        broker.publish("a", b"x")
        await inbox.got(b"x")


def sockets() -> int:
    """Sockets this process holds."""
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(fd.readlink()).startswith("socket:")
    return count


async def test_a_pong_that_comes_late_does_not_end_the_connection(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(nats_server.url) as broker:
        inbox = Inbox(broker, "a")
        await broker.flush()
        nats_server.suspend()
        monkeypatch.setattr(connection, "CONFIRM_TIMEOUT_SECONDS", 0.1)
        with pytest.raises(Unanswered, match="did not answer a ping"):
            await broker.flush()
        with pytest.raises(nats.errors.FlushTimeoutError):
            await broker.nc.flush(timeout=0.1)  # type: ignore[arg-type]
        nats_server.resume()
        monkeypatch.setattr(connection, "CONFIRM_TIMEOUT_SECONDS", 30.0)
        await broker.flush()
        broker.publish("a", b"x")
        await inbox.got(b"x")
        assert broker.nc.stats["reconnects"] == 0


async def test_a_server_that_hangs_up_in_the_middle_of_the_handshake_is_tried_again(nats_server: NatsServer) -> None:
    async with HangingUp(nats_server) as door, connected(f"nats://{HOST}:{door.port}") as broker:
        inbox = Inbox(broker, "a")
        await broker.flush()
        for stage in ("accept", "info", "half info", "no info", "pong"):
            door.stage = stage
            tried = door.hung_up
            door.drop()
            await eventually(lambda tried=tried: door.hung_up >= tried + 2)
            door.stage = ""
            await back(broker)
            broker.publish("a", stage.encode())
            await inbox.got(stage.encode())


async def test_closing_does_not_wait_for_a_server_that_does_not_read(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = await connect(NatsSettings(nats_server.url))
    monkeypatch.setattr(connection, "CONFIRM_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT_SECONDS", 60.0)  # it must not come to that
    nats_server.suspend()
    for _ in range(9):
        broker.write(b"PUB b 8000000\r\n" + bytes(8_000_000))
    with pytest.raises(Unavailable, match="64 MiB"):
        broker.write(b"PUB b 0\r\n\r\n")
    Inbox(broker, "a").subscription.unsubscribe()  # control lines pass the bound: without them a table would be wrong
    async with asyncio.timeout(20):
        await broker.close()
    assert not broker.connected


async def test_closing_writes_what_waits_and_fails_what_is_in_flight(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as other:
        inbox = Inbox(other, "a")
        await inbox.subscription.confirmed()
        broker = await connect(NatsSettings(nats_server.url))
        waiting = asyncio.create_task(broker.request("a", b"question", timeout_seconds=30), name="request")
        await asyncio.sleep(0)
        for i in range(1000):
            broker.publish("a", b"%d" % i)
        await broker.close()
        with pytest.raises(Unanswered):
            await waiting
        await inbox.got(b"999")
        assert inbox.payloads == [b"question", *(b"%d" % i for i in range(1000))]
        with pytest.raises(Unavailable):
            broker.publish("a", b"x")


async def test_where_no_server_is_connecting_says_so_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_SECONDS", 1.0)
    async with asyncio.timeout(20):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1:") as refused:
            await connect(NatsSettings("nats://user:secret@127.0.0.1:1"))
    assert "secret" not in str(refused.value)


async def test_closing_while_an_attempt_to_reconnect_fails_leaves_nobody_trying(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trying = asyncio.Event()

    async def refused_when_cancelled(self: EngineClient, server: object) -> None:
        trying.set()
        try:
            await asyncio.sleep(60)  # an attempt that only a cancellation ends
        except asyncio.CancelledError:
            if lost.pop():  # the cancellation is taken for the end of the attempt, as `wait_for` of Python 3.11 may
                raise ConnectionRefusedError from None
            raise

    lost = [False, True, True]
    broker = await connect(NatsSettings(nats_server.url))
    monkeypatch.setattr(EngineClient, "_connect_to_server", refused_when_cancelled)
    nats_server.kill()
    await asyncio.wait_for(trying.wait(), 20)
    task = broker.nc._reconnection_task
    await broker.close()
    assert task is not None
    assert task.done()
