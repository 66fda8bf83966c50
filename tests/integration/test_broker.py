"""The connection to a real nats-server: every call has its deadline and its named outcome, and nothing ends it for good."""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Self

import nats.errors
import pytest
import structlog

from engine import connection
from engine.errors import ApiError, Forbidden, Unanswered, Unavailable
from engine.jetstream import Broker, NatsSettings, Outgoing, connect
from seamark.dev.servers import HOST, NatsServer
from tests.support.logs import connected, eventually


@contextlib.asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Fails when the block takes longer."""
    async with asyncio.timeout(seconds):
        yield


class Inbox:
    """Collects the payloads of a subject."""

    def __init__(self, broker: Broker, subject: str) -> None:
        self.payloads: list[bytes] = []
        self.subscription = broker.subscribe(subject, self._take)

    def _take(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        self.payloads.append(payload)

    async def got(self, payload: bytes) -> None:
        await eventually(lambda: payload in self.payloads)


async def lost(broker: Broker) -> None:
    await eventually(lambda: not broker.connected)


async def back(broker: Broker) -> None:
    await eventually(lambda: broker.connected)
    await broker.flush()


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_INTERVAL_SECONDS", 0.2)
    monkeypatch.setattr(connection, "CONFIRM_TIMEOUT_SECONDS", 0.3)


async def stream(broker: Broker, name: str = "S", **config: object) -> None:
    base = {"name": name, "subjects": [f"{name.lower()}.>"], "storage": "file", "num_replicas": 1}
    base |= {"allow_direct": True, "allow_atomic": True, "discard": "new", "max_consumers": 8}
    await broker.api(f"STREAM.CREATE.{name}", base | config)


# --- subscriptions ----------------------------------------------------------------------------------------------------


async def test_a_confirmed_subscription_misses_nothing_published_elsewhere_afterwards(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as one, connected(nats_server.url) as other:
        for i in range(50):
            inbox = Inbox(one, f"a.{i}")
            await inbox.subscription.confirmed()
            other.publish(f"a.{i}", b"x")
            await inbox.got(b"x")
            inbox.subscription.unsubscribe()
        assert len(one.nc._subs) == len(one.nc.parser.handlers)


async def test_all_who_confirm_at_the_same_time_share_a_ping(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(nats_server.url) as broker:
        written: list[bytes] = []
        control = broker._control
        monkeypatch.setattr(broker, "_control", lambda line: (written.append(line), control(line)))
        inboxes = [Inbox(broker, f"a.{i}") for i in range(100)]
        await asyncio.gather(*(inbox.subscription.confirmed() for inbox in inboxes))
        assert written.count(b"PING\r\n") == 1
        await inboxes[0].subscription.confirmed()
        assert written.count(b"PING\r\n") == 2


async def test_a_waiter_that_gives_up_takes_the_ping_from_nobody_else(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        waiting = [asyncio.create_task(broker.flush(), name=f"flush {i}") for i in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == [None, None]


async def test_subscriptions_survive_a_kill_of_the_server_and_ended_ones_stay_ended(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        kept, before = Inbox(broker, "kept"), Inbox(broker, "ended.before")
        during = Inbox(broker, "ended.during")
        before.subscription.unsubscribe()
        await broker.flush()
        nats_server.kill()
        await lost(broker)
        during.subscription.unsubscribe()
        added = Inbox(broker, "added.during")
        nats_server.start()
        await back(broker)
        for subject in ("ended.before", "ended.during", "kept", "added.during"):
            broker.publish(subject, b"x")
        await broker.flush()
        assert (kept.payloads, added.payloads) == ([b"x"], [b"x"])
        assert before.payloads + during.payloads == []


async def test_every_reconnect_callback_is_called_whatever_another_does(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        called: list[str] = []
        broker.on_disconnect += [lambda: 1 / 0, lambda: called.append("lost")]  # type: ignore[list-item]
        broker.on_reconnect += [lambda: 1 / 0, lambda: called.append("back")]  # type: ignore[list-item]
        broker.on_doubt += [lambda: 1 / 0, lambda: called.append("doubt")]  # type: ignore[list-item]
        nats_server.restart(kill=True)
        await eventually(lambda: "back" in called)
        assert called[0] == "doubt"
        assert called.count("lost") == 1
        await broker.flush()


# --- requests ------------------------------------------------------------------------------------------------------------


async def test_a_request_nobody_listens_for_is_unavailable_at_once(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker, within(1):
        with pytest.raises(Unavailable, match=r"nobody answers on no\.body"):
            await broker.request("no.body.alice", timeout_seconds=30)


async def test_a_request_nobody_answers_ends_at_its_deadline(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await Inbox(broker, "slow").subscription.confirmed()
        started = time.monotonic()
        with pytest.raises(Unanswered, match=r"within 0\.2 s"):
            await broker.request("slow", timeout_seconds=0.2)
        assert 0.15 < time.monotonic() - started < 1
        assert broker._waiting == {}


async def test_requests_in_flight_fail_when_the_connection_is_lost_and_later_ones_at_once(
    nats_server: NatsServer,
) -> None:
    async with connected(nats_server.url) as broker:
        await Inbox(broker, "slow").subscription.confirmed()
        waiting = [asyncio.create_task(broker.request("slow", timeout_seconds=30), name=f"r{i}") for i in range(5)]
        await broker.flush()
        nats_server.kill()
        async with within(3):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(result) for result in results} == {Unanswered}
        await lost(broker)
        async with within(0.2):
            for attempt in (broker.request("slow"), broker.commit([Outgoing("s.a", b"")]), broker.api("INFO")):
                with pytest.raises(Unavailable, match="not connected"):
                    await attempt
            with pytest.raises(Unanswered, match="lost"):
                await broker.flush()
            with pytest.raises(Unavailable, match="not connected"):
                broker.publish("a", b"x")
        assert broker._waiting == {}


async def test_nothing_published_while_disconnected_is_sent_later(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        inbox = Inbox(broker, "a")
        nats_server.kill()
        await lost(broker)
        with pytest.raises(Unavailable):
            broker.publish("a", b"stale")
        nats_server.start()
        await back(broker)
        broker.publish("a", b"fresh")
        await inbox.got(b"fresh")
        assert inbox.payloads == [b"fresh"]


async def test_a_message_above_the_servers_limit_is_refused_here_and_nothing_else_suffers(
    nats_server: NatsServer,
) -> None:
    too_large = b"x" * (nats_server.max_payload_bytes + 1)
    async with connected(nats_server.url) as broker:
        await stream(broker)
        with pytest.raises(ApiError, match="max_payload") as refused:
            broker.publish("a", too_large)
        assert refused.value.err_code == 10054
        for attempt in (
            broker.request("a", too_large),
            broker.append("s.a", too_large),
            broker.commit([Outgoing("s.a", b"x"), Outgoing("s.b", too_large)]),
        ):
            with pytest.raises(ApiError, match="max_payload"):
                await attempt
        # Many messages above it together are no harm.
        await broker.commit([Outgoing("s.a", b"x" * 500_000)] * 6)
        assert broker.nc.stats["reconnects"] == 0


# --- what a server may do to a connection --------------------------------------------------------------------------------


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
    other.start()
    try:
        async with connected(f"{nats_server.url},{other.url}") as broker:
            inbox = Inbox(broker, "a")
            await broker.flush()
            first, second = (
                (nats_server, other) if broker.nc.connected_url.port == nats_server.port else (other, nats_server)
            )
            started = time.monotonic()
            first.suspend()
            # More than the kernel takes for a peer that does not read: closing in good order would never end.
            broker.write(b"PUB b 8000000\r\n" + bytes(8_000_000))
            await eventually(lambda: broker.connected and broker.nc.connected_url.port == second.port, seconds=14)
            assert time.monotonic() - started < 13
            broker.publish("a", b"x")
            await inbox.got(b"x")
    finally:
        other.kill()


async def test_a_server_that_wakes_up_is_taken_again_and_no_attempt_in_between_leaks_a_socket(
    nats_server: NatsServer, quick_pings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(nats_server.url) as broker:
        monkeypatch.setitem(broker.nc.options, "connect_timeout", 0.1)
        inbox = Inbox(broker, "a")
        waiting = asyncio.create_task(broker.request("a", timeout_seconds=30), name="request")
        await broker.flush()
        before = sockets()
        nats_server.suspend()
        with pytest.raises(Unanswered, match="lost"):
            await waiting
        await eventually(lambda: broker.nc._server_pool[0].reconnects >= 8)
        assert sockets() <= before + 1
        nats_server.resume()
        await back(broker)
        assert sockets() <= before
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
    monkeypatch.setattr(connection, "CONFIRM_TIMEOUT_SECONDS", 0.1)
    async with connected(nats_server.url) as broker:
        inbox = Inbox(broker, "a")
        await broker.flush()
        nats_server.suspend()
        with pytest.raises(Unanswered, match="did not answer a ping"):
            await broker.flush()
        with pytest.raises(nats.errors.FlushTimeoutError):
            await broker.nc.flush(timeout=0.1)  # type: ignore[arg-type]
        nats_server.resume()
        monkeypatch.setattr(connection, "CONFIRM_TIMEOUT_SECONDS", 5.0)
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


class HangingUp:
    """A way to a server on which connections are reset at a stage of their handshake."""

    def __init__(self, server: NatsServer) -> None:
        self._target = server.port
        self.stage = ""
        self.hung_up = 0
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drop()
        self._server.close()

    def drop(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection(HOST, self._target)
        self._open |= {writer, there}
        try:
            if self.stage:
                await self._hang_up(writer, there_reader, there, reader)
            else:
                await asyncio.gather(self._pump(reader, there), self._pump(there_reader, writer))
        finally:
            self._open -= {writer, there}
            writer.transport.abort()
            there.transport.abort()

    async def _hang_up(
        self,
        writer: asyncio.StreamWriter,
        there_reader: asyncio.StreamReader,
        there: asyncio.StreamWriter,
        reader: asyncio.StreamReader,
    ) -> None:
        info = await there_reader.readline()
        if self.stage == "info":
            writer.write(info)
        elif self.stage == "half info":
            writer.write(info[: len(info) // 2])
        elif self.stage == "no info":
            writer.write(b"INFO\r\n")
        elif self.stage == "pong":
            writer.write(info)
            for _ in range(2):
                there.write(await reader.readline())
            writer.write(await there_reader.readline())
        await writer.drain()
        # Zero seconds of linger: a reset, not an end of file.
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hung_up += 1

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


async def test_closing_does_not_wait_for_a_server_that_does_not_read(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONFIRM_TIMEOUT_SECONDS", 0.3)
    broker = await connect(NatsSettings(nats_server.url))
    nats_server.suspend()
    for _ in range(9):
        broker.write(b"PUB b 8000000\r\n" + bytes(8_000_000))
    with pytest.raises(Unavailable, match="64 MiB"):
        broker.write(b"PUB b 0\r\n\r\n")
    Inbox(broker, "a").subscription.unsubscribe()  # control lines pass the bound: without them a table would be wrong
    async with within(3):
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
    async with within(3):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1:") as refused:
            await connect(NatsSettings("nats://user:secret@127.0.0.1:1"))
    assert "secret" not in str(refused.value)


# --- permissions -----------------------------------------------------------------------------------------------------------

USERS = """
authorization { users: [
  {user: all, password: secret}
  {user: few, password: secret, permissions: {
    publish: ["allowed.>", "s.allowed", "$JS.API.STREAM.INFO.S"], subscribe: ["_INBOX.>", "allowed.>"]}}
] }
"""


@pytest.fixture
def guarded_server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "guarded", extra_config=USERS)
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def test_what_is_not_permitted_is_said_at_once_and_the_rest_goes_on(guarded_server: NatsServer) -> None:
    url = guarded_server.url
    async with (
        connected(url, user="all", password="secret") as owner,
        connected(url, user="few", password="secret") as broker,
        within(5),
    ):
        await stream(owner)
        with structlog.testing.capture_logs() as logs:
            for attempt in (
                broker.request("forbidden.Alice", timeout_seconds=30),
                broker.api("STREAM.INFO.OTHER"),
                broker.next_by_subject("S", "s.allowed", 1, timeout_seconds=30),
                broker.append("s.forbidden", b"x"),
                broker.commit([Outgoing("s.allowed", b"x"), Outgoing("s.forbidden", b"x")], timeout_seconds=30),
                broker.commit(
                    [Outgoing("s.allowed", b"x"), Outgoing("s.forbidden", b"x"), Outgoing("s.allowed", b"x")]
                ),
                Inbox(broker, "forbidden.>").subscription.confirmed(),
            ):
                with pytest.raises(Forbidden, match="not permitted to this user"):
                    await attempt
            broker.publish("forbidden.Alice", b"x")
            await Inbox(broker, "allowed.>").subscription.confirmed()
        said = [line["what"] for line in logs if line["event"] == "NATS does not permit this"]
        assert "Publish forbidden.Alice" in said
        assert "Subscription forbidden.>" in said
        assert len(said) == len(set(said))
        assert (await broker.append("s.allowed", b"x")).seq == 1
        assert broker.nc.stats["reconnects"] == 0


async def test_a_wrong_password_is_named_as_the_reason(
    guarded_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_SECONDS", 1.0)
    with pytest.raises(Unavailable, match=r"(?i)authorization violation"):
        await connect(NatsSettings(guarded_server.url, user="all", password="wrong"))
