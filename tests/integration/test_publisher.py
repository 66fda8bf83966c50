"""Publishing over NATS when servers, ways and rights fail. What a service gets is an error it can act on, in time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from engine.broker.jetstream import connect
from engine.topology import server as topology
from ops.dev.servers import Change, NatsServer
from seamark import ConnectionClosed, Published, Publisher, PublishFailed, PublishRefused
from seamark.client import over_nats
from seamark.client import publisher as publisher_module
from seamark.client.publisher import BUDGET_SECONDS
from tests.support.backoff import TwoAttempts
from tests.support.logs import connected, eventually
from tests.support.network import bad_network
from tests.support.topology import Overrides, password, running_with_accounts, settings_for

SMALL = Overrides(stream_bytes=dict.fromkeys(("EVENTS", "BULK", "LOG", "RECEIPTS", "DEAD-LETTERS"), 1 << 24))
TINY = Overrides(
    stream_bytes={**dict.fromkeys(("BULK", "LOG", "RECEIPTS", "DEAD-LETTERS"), 1 << 24), "EVENTS": 1 << 19}
)


async def prepare(server: NatsServer, overrides: Overrides = SMALL) -> None:
    async with connected(server.url) as broker:
        await topology.ensure(broker, "dev", overrides=overrides)


async def stored(server: NatsServer) -> int:
    async with connected(server.url) as broker:
        return (await broker.stream("EVENTS")).messages


async def test_what_is_published_while_its_connections_break_is_stored_once(nats_server: NatsServer) -> None:
    await prepare(nats_server)
    port = int(nats_server.url.rpartition(":")[2])
    async with bad_network(port) as network, Publisher(nats_url=f"nats://127.0.0.1:{network.port}") as publisher:
        published: list[Published] = []

        async def publish(numbers: range) -> None:
            for number in numbers:
                to = f"user{number % 7}"
                published.append(await publisher.publish(to=to, type="demo.n", data=number, id=f"e{number}"))

        async with asyncio.TaskGroup() as tasks:
            for start in range(0, 300, 30):
                tasks.create_task(publish(range(start, start + 30)), name=f"from-{start}")
            for cuts in range(1, 4):
                await eventually(lambda: len(published) >= cuts * 50, every_seconds=0.001)  # noqa: B023
                network.cut()
                await eventually(lambda: network.refused >= cuts, every_seconds=0.001)  # noqa: B023
                network.restore()
        assert len({each.seq for each in published}) == 300
        assert await stored(nats_server) == 300


async def test_a_socket_that_uvloop_calls_closed_while_it_is_written_is_a_lost_connection_and_no_fault(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(nats_server)
    tries, publish = [], Client.publish

    async def once_closed(client: Client, subject: str, *args: Any, **more: Any) -> None:
        tries.append(subject)
        if len(tries) == 1:
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
        await publish(client, subject, *args, **more)

    monkeypatch.setattr(Client, "publish", once_closed)
    async with Publisher(nats_url=nats_server.url) as publisher:
        assert (await publisher.publish(to="anna", type="demo.n", data=1, id="e1")).seq == 1
    assert len(tries) == 2


async def test_a_way_that_has_gone_silent_is_given_up_for_another(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(over_nats, "PING_SECONDS", 0.5)
    await prepare(nats_server)
    port = int(nats_server.url.rpartition(":")[2])
    async with bad_network(port) as network, Publisher(nats_url=f"nats://127.0.0.1:{network.port}") as publisher:
        await publisher.publish(to="alice", type="demo.n")
        network.blackhole()
        with monkeypatch.context() as quickly:
            quickly.setattr(publisher_module, "Backoff", TwoAttempts)
            quickly.setattr(over_nats, "CONNECT_SECONDS", 0.5)
            with pytest.raises(PublishFailed, match="again is safe"):
                async with Publisher(nats_url=f"nats://127.0.0.1:{network.port}"):
                    pass
        before = network.connections
        publishing = asyncio.create_task(publisher.publish(to="alice", type="demo.n", id="late"), name="publishing")
        await eventually(lambda: network.connections > before)  # its own second one
        network.cut()
        network.restore()
        async with asyncio.timeout(35):
            assert (await publishing).event_id == "late"


async def test_what_the_store_refuses_is_refused_at_once_with_its_reason(nats_server: NatsServer) -> None:
    await prepare(nats_server, TINY)
    async with Publisher(nats_url=nats_server.url) as publisher:
        began = time.monotonic()
        with pytest.raises(PublishRefused, match="maximum bytes exceeded") as refused:
            await asyncio.gather(*[publisher.publish(to="alice", type="demo.n", data="x" * 100_000) for _ in range(10)])
        assert time.monotonic() - began < BUDGET_SECONDS / 2
        assert refused.value.problem["err_code"] == 10077


@pytest.mark.overlay((Change("max_payload", "64KB", "the shipped one is above the largest event"),))
async def test_what_is_larger_than_the_server_takes_is_refused_and_the_connection_stays(
    nats_server: NatsServer,
) -> None:
    async with connected(nats_server.url) as broker, Publisher(nats_url=nats_server.url) as publisher:
        await broker.api("STREAM.CREATE.EVENTS", {"name": "EVENTS", "subjects": ["events.>"]})
        with pytest.raises(PublishRefused, match="larger than the server takes"):
            await publisher.publish(to="alice", type="demo.n", data="x" * 100_000)
        assert (await publisher.publish(to="alice", type="demo.n")).seq == 1


async def test_a_service_without_the_right_to_publish_is_told_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_with_accounts(tmp_path / "nats", monkeypatch) as server:
        provisioner = await connect(settings_for(server.url, "provisioner"))
        await topology.ensure(provisioner, "dev", overrides=SMALL)
        await provisioner.close()
        login = {"user": "publisher", "password": password("publisher")}
        async with Publisher(nats_url=server.url, tenant="other", **login) as publisher:
            began = time.monotonic()
            with pytest.raises(PublishRefused, match="may not publish to events") as refused:
                await publisher.publish(to="alice", type="demo.n")
            assert refused.value.status == 403
            assert time.monotonic() - began < BUDGET_SECONDS / 2
        monkeypatch.setattr(publisher_module, "Backoff", TwoAttempts)
        with pytest.raises(PublishFailed, match="no NATS server takes us in") as failed:
            async with Publisher(nats_url=server.url, user="publisher", password="a guess"):
                pass
        assert "a guess" not in str(failed.value)


async def test_a_stream_that_is_not_there_yet_is_waited_for_within_the_budget(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Publisher(nats_url=nats_server.url) as publisher:
        publishing = asyncio.create_task(publisher.publish(to="alice", type="demo.n", id="early"), name="publishing")
        await prepare(nats_server)
        assert (await publishing).seq == 1
    hasty = Publisher(nats_url=nats_server.url)
    async with hasty:
        async with connected(nats_server.url) as broker:
            await broker.api("STREAM.DELETE.EVENTS")
        monkeypatch.setattr(publisher_module, "Backoff", TwoAttempts)  # each has time for an answer
        with pytest.raises(PublishFailed, match="nobody answers"):
            await hasty.publish(to="alice", type="demo.n")
    with pytest.raises(ConnectionClosed):
        await hasty.publish(to="alice", type="demo.n")


async def test_closing_ends_a_publish_under_way(nats_server: NatsServer) -> None:
    publisher = Publisher(nats_url=nats_server.url)
    async with publisher:
        publishing = asyncio.create_task(publisher.publish(to="alice", type="demo.n"), name="publishing")
        await asyncio.sleep(0)
    async with asyncio.timeout(BUDGET_SECONDS / 2):
        with pytest.raises(ConnectionClosed):
            await publishing


async def test_closing_ends_a_publish_that_is_connecting_anew_and_leaves_no_connection(nats_server: NatsServer) -> None:
    await prepare(nats_server)
    port = int(nats_server.url.rpartition(":")[2])
    async with bad_network(port) as network, Publisher(nats_url=f"nats://127.0.0.1:{network.port}") as publisher:
        network.cut()
        network.restore()
        network.to_server.silence()
        publishing = asyncio.create_task(publisher.publish(to="alice", type="demo.n"), name="publishing")
        await eventually(lambda: network.connections == 2)
        await publisher.close()
        network.restore()
        async with asyncio.timeout(30):
            with pytest.raises(ConnectionClosed):
                await publishing
        assert await stored(nats_server) == 0
