"""Events whose message ids others foresee, with accounts and without."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.broker import wire
from engine.broker.eventstore import EventStore
from engine.broker.jetstream import Broker, connect
from engine.topology import server as topology
from ops.dev.servers import NatsServer
from seamark import Publisher
from seamark.protocol.appends import sealed
from seamark.protocol.events import encode, message_id
from tests.support.logs import connected
from tests.support.topology import Overrides, password, running_with_accounts, settings_for

SMALL = Overrides(stream_bytes=dict.fromkeys(("EVENTS", "BULK", "LOG", "RECEIPTS", "DEAD-LETTERS"), 1 << 24))
# With accounts a publisher may publish events of its own tenant only; a service of the same tenant is still another one.
ATTACK = b'{"id":"victim","to":["mallory"]}'


@asynccontextmanager
async def logged_in(server: NatsServer, role: str) -> AsyncIterator[Broker]:
    broker = await connect(settings_for(server.url, role))
    try:
        yield broker
    finally:
        await broker.close()


async def test_with_accounts_a_message_id_that_another_publisher_can_foresee_suppresses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_with_accounts(tmp_path / "nats", monkeypatch) as server:
        async with (
            logged_in(server, "provisioner") as provisioner,
            logged_in(server, "gateway") as gateway,
            logged_in(server, "publisher") as attacker,
        ):
            await topology.ensure(provisioner, "dev", overrides=SMALL)
            own = b"another password"
            for foreseen in (message_id("default", "victim"), sealed(message_id("default", "victim"), own)):
                await attacker.append("events.default.mallory.x", ATTACK, msg_id=foreseen)
            events, event = EventStore(gateway), encode(to=["alice"], type="order.shipped", id="victim")
            first, again = await events.append(event), await events.append(event)
            assert (first.duplicate, again.duplicate, again.seq) == (False, True, first.seq)
            async with (
                Publisher(nats_url=server.url, user="publisher", password=password("publisher")) as one,
                Publisher(nats_url=server.url, user="publisher", password=password("publisher")) as two,
            ):
                answers = [await each.publish(to="alice", type="order.shipped", id="second") for each in (one, two)]
                assert [answer.duplicate for answer in answers] == [False, True]


async def test_an_event_is_published_again_where_its_duplicate_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_with_accounts(tmp_path / "nats", monkeypatch) as server:
        async with (
            logged_in(server, "provisioner") as provisioner,
            logged_in(server, "publisher") as publisher,
        ):
            await topology.ensure(provisioner, "dev", overrides=SMALL)
            await publisher.append("events.default.mallory.x", ATTACK, msg_id="default:victim")
            events = EventStore(publisher)
            events._secret = None  # as behind a proxy that logs in for us
            ack = await events.append(encode(to=["alice"], type="order.shipped", id="victim"))
            assert (ack.duplicate, ack.seq) == (False, 2)


async def test_without_accounts_a_duplicate_is_looked_at_before_it_is_believed(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker, Publisher(nats_url=nats_server.url) as publisher:
        await topology.ensure(broker, "dev", overrides=SMALL)
        await broker.append("events.evil.mallory.x", ATTACK, msg_id="default:victim")
        published = await publisher.publish(to="alice", type="order.shipped", id="victim")
        assert (published.duplicate, published.seq) == (False, 2)
        stored = await broker.leader_last("EVENTS", "ev.*.default.>")
        assert stored is not None
        assert stored.subject.endswith(".default.alice.order.shipped")
        # Of the same tenant and id it is the same event, whatever else it says.
        first = await publisher.publish(to="alice", type="order.shipped", id="mine")
        again = await publisher.publish(to="bob", type="order.returned", id="mine")
        assert (first.duplicate, again.duplicate, again.seq) == (False, True, first.seq)


async def test_an_event_called_a_duplicate_of_one_that_is_gone_is_published_again(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=SMALL)
        events, event = EventStore(broker), encode(to=["alice"], type="x", id="e1")
        first = await events.append(event)
        await broker.api("STREAM.MSG.DELETE.EVENTS", {"seq": first.seq})
        again = await events.append(event)
        assert not again.duplicate
        assert again.seq > first.seq


def test_a_seal_is_the_same_each_time_and_another_for_another_secret_or_event() -> None:
    assert sealed("t:e", b"s") == sealed("t:e", b"s")
    assert sealed("t:e", b"s").startswith("t:e:")
    assert len({sealed(msg_id, secret) for msg_id in ("t:e", "t:f", "u:e") for secret in (b"s", b"r")}) == 6
    assert wire.header_lines({"Nats-Msg-Id": sealed("t:" + "~" * 128, b"s")})
