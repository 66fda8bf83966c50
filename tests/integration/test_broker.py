"""Subscriptions and requests on a real nats-server: every call has its deadline and its named outcome."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import structlog

from engine.broker import connection
from engine.broker.jetstream import Broker, NatsSettings, Outgoing, connect
from engine.errors import ApiError, Forbidden, Unanswered, Unavailable
from ops.dev.servers import Change, NatsServer
from tests.support.inbox import Inbox, back, lost
from tests.support.logs import connected, eventually


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
        gather = broker._gather
        monkeypatch.setattr(broker, "_gather", lambda line: (written.append(line), gather(line)))
        inboxes = [Inbox(broker, f"a.{i}") for i in range(100)]
        await asyncio.gather(*(inbox.subscription.confirmed() for inbox in inboxes))
        assert written.count(b"PING\r\n") == 1
        await inboxes[0].subscription.confirmed()
        assert written.count(b"PING\r\n") == 2


async def test_what_is_written_in_one_turn_of_the_loop_leaves_in_one_write(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(nats_server.url) as broker:
        transport = Mock(wraps=connection.outgoing(broker.nc))
        monkeypatch.setattr(connection, "outgoing", lambda client: transport)
        inbox = Inbox(broker, "a.*")
        for number in range(3):
            broker.publish(f"a.{number}", b"%d" % number)
        await broker.flush()
        # The second is the ping of the flush, which goes out by itself.
        assert [call.args[0].count(b"PUB") for call in transport.write.call_args_list] == [3, 0]
        assert inbox.payloads == [b"0", b"1", b"2"]


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
    async with connected(nats_server.url) as broker, asyncio.timeout(20):
        with pytest.raises(Unavailable, match=r"nobody answers on no\.body"):
            await broker.request("no.body.alice", timeout_seconds=30)


async def test_a_request_nobody_answers_ends_at_its_deadline(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await Inbox(broker, "slow").subscription.confirmed()
        started = time.monotonic()
        with pytest.raises(Unanswered, match=r"within 0\.2 s"):
            await broker.request("slow", timeout_seconds=0.2)
        assert 0.15 < time.monotonic() - started < 20
        assert broker._waiting == {}


async def test_requests_in_flight_fail_when_the_connection_is_lost_and_later_ones_at_once(
    nats_server: NatsServer,
) -> None:
    async with connected(nats_server.url) as broker:
        await Inbox(broker, "slow").subscription.confirmed()
        waiting = [asyncio.create_task(broker.request("slow", timeout_seconds=30), name=f"r{i}") for i in range(5)]
        await broker.flush()
        nats_server.kill()
        async with asyncio.timeout(20):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(result) for result in results} == {Unanswered}
        await lost(broker)
        async with asyncio.timeout(10):  # one after the other, they would wait longer for answers
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


# --- permissions -----------------------------------------------------------------------------------------------------------

USERS = Change(
    "authorization",
    """{ users: [
  {user: all, password: secret}
  {user: few, password: secret, permissions: {
    publish: ["allowed.>", "s.allowed", "$JS.API.STREAM.INFO.S"], subscribe: ["_INBOX.>", "allowed.>"]}}
] }""",
    "a user who may little of what these tests ask for",
)


@pytest.fixture
def guarded_server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "guarded", overlay=(USERS,))
    try:
        server.start()
        yield server
    finally:
        server.kill()


async def test_what_is_not_permitted_is_said_at_once_and_the_rest_goes_on(guarded_server: NatsServer) -> None:
    url = guarded_server.url
    async with (
        connected(url, user="all", password="secret") as owner,
        connected(url, user="few", password="secret") as broker,
        asyncio.timeout(20),
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
        said = [line["what"] for line in logs if line["event"] == "nats_forbids"]
        assert "Publish forbidden.Alice" in said
        assert "Subscription forbidden.>" in said
        assert len(said) == len(set(said))
        assert (await broker.append("s.allowed", b"x")).seq == 1
        assert broker.nc.stats["reconnects"] == 0


async def test_a_wrong_password_is_named_as_the_reason(
    guarded_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in (1.0, 6.0, 25.0):  # within which the server has to say so
        monkeypatch.setattr(connection, "CONNECT_TIMEOUT_SECONDS", seconds)
        with pytest.raises(Unavailable) as refused:
            await connect(NatsSettings(guarded_server.url, user="all", password="wrong"))
        if "authorization violation" in str(refused.value).lower():
            return
    raise AssertionError(str(refused.value))
