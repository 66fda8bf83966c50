"""The Python SDK on real servers: publish over NATS and HTTP, follow through a real gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

from engine.broker.jetstream import connect as connect_broker
from engine.topology import server as topology
from ops.dev.child import free_port
from ops.dev.servers import NatsServer, Valkey
from seamark import (
    Backoff,
    Connection,
    FileCursor,
    InvalidEvent,
    Live,
    NotAuthenticated,
    Published,
    Publisher,
    PublishFailed,
    PublishRefused,
    Record,
    Reset,
    State,
    Timing,
    connect,
)
from seamark.protocol.subjects import encode_token, log_stream, partition_of
from tests.support.logs import FAST, all_records, eventually
from tests.support.network import bad_network
from tests.support.spine import API_KEY, RunningGateway, Spine, spine
from tests.support.tokens import token
from tests.support.topology import password, passwords, server_with_accounts, settings_for


@pytest.fixture
async def way(nats_server: NatsServer, valkey: Valkey, postgres: str) -> AsyncIterator[Spine]:
    async with spine(nats_server.url, valkey.url, postgres) as running:
        yield running


@pytest.fixture
async def gateway(way: Spine) -> AsyncIterator[RunningGateway]:
    async with way.gateway() as running:
        yield running


def follow(url: str, user: str = "alice", **options: object) -> Connection:
    settings: dict[str, object] = {
        "token": token(user),
        "device": "laptop",
        "cursor": "start",
        "backoff": Backoff(first_seconds=0.02, max_seconds=0.2),
        **options,
    }
    return connect(url, **settings)


async def take(records: Connection, number: int) -> list[Record]:
    """The next `number` records, each done."""
    got: list[Record] = []
    async with asyncio.timeout(20):
        while len(got) < number:
            got.append(await anext(records))
            got[-1].ack()
    return got


async def test_what_is_published_over_nats_and_over_http_arrives_once_in_order_with_its_chain(way, gateway):
    async with (
        Publisher(nats_url=way.nats_url) as inside,
        Publisher(gateway_url=gateway.url, api_key=API_KEY) as outside,
        follow(gateway.url) as records,
    ):
        for number in range(10):
            publisher = outside if number % 2 else inside
            published = await publisher.publish(to="alice", type="demo.n", data={"n": number}, id=f"e{number}")
            assert published.event_id == f"e{number}"
            assert published.seq is not None
        got = await take(records, 10)
    assert [record.data["n"] for record in got] == list(range(10))
    assert [record.id for record in got] == [f"e{number}" for number in range(10)]
    assert all(later.prev >= earlier.seq for earlier, later in pairwise(got))
    assert {record.kind for record in got} == {"notification"}


async def test_publishing_the_same_id_again_says_so_and_adds_nothing(way, gateway):
    async with (
        Publisher(nats_url=way.nats_url) as inside,
        Publisher(gateway_url=gateway.url, api_key=API_KEY) as outside,
    ):
        first = await inside.publish(to=["alice"], type="demo.hello", id="once")
        again = [await one.publish(to=["alice"], type="demo.hello", id="once") for one in (inside, outside)]
        await inside.publish(to=["alice"], type="demo.hello", id="last")
        await eventually(lambda: recorded(way, 2))
    assert first == Published("once", first.seq, duplicate=False)
    assert again == [Published("once", first.seq, duplicate=True)] * 2


async def recorded(way: Spine, number: int) -> bool:
    return len(await all_records(way.broker, 4)) >= number


async def test_the_current_trace_goes_with_the_event_to_the_device(way, gateway):
    tracer = TracerProvider().get_tracer("test")
    async with (
        Publisher(nats_url=way.nats_url) as inside,
        Publisher(gateway_url=gateway.url, api_key=API_KEY) as outside,
        follow(gateway.url) as records,
    ):
        with tracer.start_as_current_span("order") as span:
            await inside.publish(to="alice", type="demo.hello")
            await outside.publish(to="alice", type="demo.hello")
        expected = format(span.get_span_context().trace_id, "032x")
        assert [record.record["trace"].split("-")[1] for record in await take(records, 2)] == [expected] * 2


async def test_an_impossible_event_is_refused_before_it_is_sent_and_by_the_gateway_with_its_reason(way, gateway):
    async with Publisher(nats_url=way.nats_url) as publisher:
        with pytest.raises(InvalidEvent, match="to"):
            await publisher.publish(to=[], type="demo.hello")
        with pytest.raises(InvalidEvent, match="data"):
            await publisher.publish(to="alice", type="demo.hello", data="x" * 300_000)
    async with Publisher(gateway_url=gateway.url, api_key="wrong") as publisher:
        with pytest.raises(PublishRefused, match="API key") as refused:
            await publisher.publish(to="alice", type="demo.hello")
        assert refused.value.status == 401


async def test_a_service_with_the_rights_of_a_publisher_and_no_more_can_publish(tmp_path: Path, monkeypatch):
    for name, value in passwords().items():
        monkeypatch.setenv(name, value)
    server = server_with_accounts(tmp_path / "nats")
    try:
        await asyncio.to_thread(server.start)
        provisioner = await connect_broker(settings_for(server.url, "provisioner"))
        await topology.ensure(provisioner, "dev", overrides=FAST)
        await provisioner.close()
        secret = password("publisher")
        address = server.url.replace("nats://", f"nats://publisher:{secret}@")
        for options in ({"nats_url": server.url, "user": "publisher", "password": secret}, {"nats_url": address}):
            async with Publisher(**options) as publisher:
                assert (await publisher.publish(to="alice", type="demo.hello")).duplicate is False
    finally:
        server.kill()


async def test_publishing_over_http_lasts_through_a_gateway_restart_and_adds_one_record(way):
    async with way.gateway() as gateway, bad_network(gateway.port) as network:
        network.cut()
        async with Publisher(gateway_url=network.url, api_key=API_KEY) as publisher:
            publishing = asyncio.create_task(
                publisher.publish(to="alice", type="demo.hello", id="patient"), name="publishing"
            )
            await eventually(lambda: network.refused >= 2)
            network.restore()
            async with asyncio.timeout(30):
                assert (await publishing).event_id == "patient"
            network.cut()
        hasty = Publisher(gateway_url=network.url, api_key=API_KEY, budget_seconds=0.3)
        async with hasty:
            with pytest.raises(PublishFailed, match="again is safe"):
                await hasty.publish(to="alice", type="demo.hello")


async def test_publishing_over_nats_lasts_through_a_server_restart(way, nats_server):
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.hello", id="before")
        nats_server.kill()
        publishing = asyncio.create_task(publisher.publish(to="alice", type="demo.hello", id="during"), name="during")
        await asyncio.to_thread(nats_server.start)
        async with asyncio.timeout(30):
            assert (await publishing).event_id == "during"


async def test_across_cut_connections_every_record_arrives_once_in_log_order(way, gateway):
    async with (
        bad_network(gateway.port) as network,
        Publisher(nats_url=way.nats_url) as publisher,
        follow(network.url) as records,
    ):
        got: list[int] = []

        async def receive() -> None:
            async for record in records:
                got.append(record.data["n"])  # noqa: PERF401 - watched while it grows

        receiving = asyncio.create_task(receive(), name="receiving")
        for number in range(200):
            await publisher.publish(to="alice", type="demo.n", data={"n": number})
            if number % 40 == 20:
                await eventually(lambda: got)  # there is a session to be cut
                network.cut()
            elif number % 40 == 30:
                network.restore()
                await eventually(lambda: len(got) > number)  # noqa: B023 - called before the next turn
        await eventually(lambda: len(got) == 200)
        receiving.cancel()
        assert got == list(range(200))
        assert records.reconnects >= 5


async def test_a_restarted_app_goes_on_from_its_file_and_a_device_without_one_gets_a_reset(
    way, gateway, tmp_path: Path
):
    path = tmp_path / "cursor"
    async with Publisher(nats_url=way.nats_url) as publisher:
        for number in range(6):
            await publisher.publish(to="alice", type="demo.n", data={"n": number})
        async with follow(gateway.url, store=FileCursor(path)) as records:
            assert [record.data["n"] for record in await take(records, 3)] == [0, 1, 2]
        async with follow(gateway.url, store=FileCursor(path)) as records:
            assert [record.data["n"] for record in await take(records, 3)] == [3, 4, 5]
        async with follow(gateway.url, cursor=None, device="fresh") as records:
            events = records.events()
            reset = await anext(events)
            assert isinstance(reset, Reset)
            assert reset.reason == "new"
            items = [await anext(events) for _ in range(7)]
            assert isinstance(items[-1], Live)
            assert [item.data["n"] for item in items[:-1] if isinstance(item, Record)] == [0, 1, 2, 3, 4, 5]


async def test_a_read_on_one_device_reaches_the_others_as_a_record(way, gateway):
    async with (
        Publisher(nats_url=way.nats_url) as publisher,
        follow(gateway.url, device="phone") as phone,
        follow(gateway.url, device="desk") as desk,
    ):
        for number in range(3):
            await publisher.publish(to="alice", type="demo.n", id=f"n{number}")
        await take(desk, 3)
        got = await take(phone, 3)
        await phone.read(ids=["n0"])
        await phone.read(up_to=got[1])
        await phone.read(all=True)
        for device in (phone, desk):
            marks = await take(device, 2)  # positions marked within a moment are one record
            assert [mark.kind for mark in marks] == ["read"] * 2
            assert {mark.record["device"] for mark in marks} == {"phone"}
            # Ids and positions are said in turns, whichever comes first: together they mean the same.
            named, reached = sorted(marks, key=lambda mark: "up_to" in mark.record)
            assert named.record["ids"] == ["n0"]
            assert reached.record["up_to"] >= got[2].seq


async def test_a_leaving_gateway_sends_its_sessions_away_and_the_next_one_continues(way):
    port, ends = free_port(), []

    def watch(state: State) -> None:
        if state is State.WAITING:
            ends.append(records.last_end)

    async with (
        way.gateway(port) as first,
        Publisher(nats_url=way.nats_url) as publisher,
        follow(first.url, on_state=watch) as records,
    ):
        await publisher.publish(to="alice", type="demo.hello", id="one")
        assert [record.id for record in await take(records, 1)] == ["one"]
        before = len(ends)
        await first.leave()
        await eventually(lambda: len(ends) > before)  # more where it comes back before the next gateway does
        assert ends[before].code == 1012
        assert ends[before].retry_after_seconds is not None
        await publisher.publish(to="alice", type="demo.hello", id="two")
        async with way.gateway(port):
            assert [record.id for record in await take(records, 1)] == ["two"]


async def test_a_token_is_refreshed_before_it_expires_and_a_static_one_ends_with_it(gateway, monkeypatch):
    # Early, so that a machine that stands still for a while is in time, too. When it is due otherwise: tests/unit.
    monkeypatch.setattr("seamark.client.token.refresh_delay", lambda lifetime_seconds: 2.0)
    timing, expiries = Timing(ack_seconds=0.05), []

    def fresh() -> str:
        expiries.append(time.time() + 7)
        return token(seconds=7)

    async with follow(gateway.url, token=fresh, timing=timing) as lasting:
        async with follow(gateway.url, token=token(seconds=2), timing=timing, device="static") as ending:
            with pytest.raises(NotAuthenticated, match="4401"):
                async with asyncio.timeout(30):
                    await anext(ending)
        await eventually(lambda: time.time() > expiries[0] + 1)
        await eventually(lambda: lasting.state is State.LIVE)
        assert (lasting.reconnects, lasting.last_end) == (0, None)
        assert len(expiries) > 1


async def test_acks_become_receipts_and_the_reset_of_a_trimmed_log_is_announced(way, gateway):
    partition = partition_of(encode_token("default"), encode_token("alice"), 4)
    reasons: list[str] = []
    async with (
        Publisher(nats_url=way.nats_url) as publisher,
        bad_network(gateway.port) as network,
        follow(network.url, on_reset=lambda reset: reasons.append(reset.reason)) as records,
    ):
        for number in range(5):
            await publisher.publish(to="alice", type="demo.n", id=f"n{number}")
        await take(records, 5)
        await eventually(lambda: receipts(way))
        network.cut()
        for number in range(5, 9):
            await publisher.publish(to="alice", type="demo.n", id=f"n{number}")
        state = await eventually(lambda: grown(way, partition))
        await way.broker.api(f"STREAM.PURGE.{log_stream(partition)}", {"seq": state.last_seq - 1})
        network.restore()
        await take(records, 1)
    assert reasons == ["trimmed"]


async def receipts(way: Spine) -> bool:
    return (await way.broker.stream("RECEIPTS")).messages > 0


async def grown(way: Spine, partition: int):
    """The log's state once it holds nine records of alice."""
    entries = [entry for entry in await all_records(way.broker, 4) if entry.user == "alice"]
    return await way.broker.stream(log_stream(partition)) if len(entries) == 9 else None
