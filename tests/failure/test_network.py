"""Connections that fall silent, break or half-close in mid-flight: deadlines hold, nothing hangs, retries store once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chaos.faults import Fault, torment
from chaos.load import whole_stream
from engine.broker.jetstream import Broker, Outgoing
from engine.dispatch.source import EVENTS
from engine.errors import BrokerError, StepDown, Unanswered, Unavailable
from engine.log.writer import MarkedWriter, Ownership, read_mark
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.chaos import TIMEOUT, Chaos
from tests.support.logs import FAST, connected, eventually, within
from tests.support.network import BadNetwork, bad_network
from tests.support.roles import dispatcher_processes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]


class Lab(NamedTuple):
    """A broker behind a bad network, and a good way to the same server to look at the truth."""

    network: BadNetwork
    far: Broker
    near: Broker


@asynccontextmanager
async def lab(server: NatsServer) -> AsyncIterator[Lab]:
    async with bad_network(server.port) as network, connected(server.url) as near:
        await topology.ensure(near, "dev", overrides=FAST)
        async with connected(f"nats://127.0.0.1:{network.port}") as far:
            yield Lab(network, far, near)
            network.restore()


REQUESTS: dict[str, Callable[[Broker], Coroutine[Any, Any, Any]]] = {
    "api": lambda broker: broker.api("STREAM.INFO.EVENTS", timeout_seconds=1),
    "request": lambda broker: broker.request("$JS.API.INFO", timeout_seconds=1),
    "append": lambda broker: broker.append("events.t.k.x", b"{}", budget_seconds=1),
    "commit": lambda broker: broker.commit([Outgoing("log.0.t.u", b"{}")], timeout_seconds=1),
    "direct get": lambda broker: broker.next_by_subject("LOG-0", "log.0.t.u", 1, timeout_seconds=1),
    "heads": lambda broker: broker.last_by_subjects("LOG-0", ["log.0.t.u"], timeout_seconds=1),
    "leader get": lambda broker: broker.leader_next("LOG-0", "log.0.t.u", 1, timeout_seconds=1),
}

BREAKAGES: dict[str, Callable[[BadNetwork], None]] = {
    "blackhole": BadNetwork.blackhole,
    "questions lost": lambda network: network.to_server.silence(),
    "answers lost": lambda network: network.to_client.silence(),
    "reset": BadNetwork.reset,
    "half-close": BadNetwork.half_close,
}


@pytest.mark.parametrize("breakage", BREAKAGES)
async def test_whatever_is_in_flight_ends_by_its_deadline_and_the_connection_comes_back(
    breakage: str, nats_server: NatsServer
) -> None:
    async with lab(nats_server) as (network, far, _):
        lost = breakage == "questions lost"
        if lost:
            network.to_server.silence()  # before they are asked: the server learns of none of them
        network.to_client.delay_seconds = 0.5  # everything is in flight when it happens
        calls = {name: asyncio.create_task(call(far), name=name) for name, call in REQUESTS.items()}
        await eventually(lambda: network.to_server.held if lost else network.to_client.held)
        BREAKAGES[breakage](network)
        await within(lambda: all(task.done() for task in calls.values()), 5)
        for task in calls.values():
            assert task.exception() is None or isinstance(task.exception(), BrokerError), task
        if breakage in ("blackhole", "questions lost", "answers lost"):
            assert all(isinstance(task.exception(), Unanswered) for task in calls.values())
        network.restore()
        await eventually(lambda: answers(far))


async def answers(broker: Broker) -> bool:
    try:
        await broker.api("STREAM.INFO.EVENTS", timeout_seconds=1)
    except BrokerError:
        return False
    return True


async def test_a_half_open_connection_is_given_up_within_ten_seconds_and_replaced(nats_server: NatsServer) -> None:
    async with lab(nats_server) as (network, far, _):
        before = network.connections
        network.blackhole()
        await within(lambda: not far.connected, 12)
        network.restore()
        network.reset()
        await eventually(lambda: answers(far))
        assert network.connections > before


async def test_an_append_whose_answer_was_lost_is_stored_once(nats_server: NatsServer) -> None:
    async with lab(nats_server) as (network, far, near):
        network.to_client.silence()
        append = asyncio.create_task(far.append("events.t.k.x", b"{}", msg_id="t:1", budget_seconds=30), name="append")
        await eventually(lambda: stored(near, "EVENTS", 1))
        network.reset()
        network.restore()
        ack = await append
        assert (ack.seq, ack.duplicate) == (1, True)
        assert await stored(near, "EVENTS", 1)


async def test_an_append_without_an_id_whose_answer_was_lost_is_not_repeated(nats_server: NatsServer) -> None:
    async with lab(nats_server) as (network, far, near):
        network.to_client.silence()
        append = asyncio.create_task(far.append("events.t.k.x", b"{}", budget_seconds=30), name="append")
        await eventually(lambda: stored(near, "EVENTS", 1))
        network.reset()
        network.restore()
        with pytest.raises(Unanswered):
            await append
        assert (await far.append("events.t.k.y", b"{}", msg_id="t:2")).seq == 2


async def test_an_append_that_never_got_through_says_that_its_outcome_is_unknown_and_not_that_it_failed(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(nats_server) as (network, far, _):
        attempts, request = [], far.request

        async def noted(*arguments: Any, **options: Any) -> Any:
            try:
                return await request(*arguments, **options | {"timeout_seconds": 1.0})  # so that there are several
            except BrokerError as error:
                attempts.append(type(error))
                raise

        monkeypatch.setattr(far, "request", noted)
        network.blackhole()
        append = asyncio.create_task(far.append("events.t.k.x", b"{}", msg_id="t:1", budget_seconds=5), name="append")
        await eventually(lambda: attempts, seconds=10)
        network.refusing = True
        network.reset()  # the last attempts find no connection at all
        with pytest.raises(Unanswered):
            await append
        assert attempts[0] is Unanswered
        assert len(attempts) > 1


async def stored(broker: Broker, stream: str, messages: int) -> bool:
    return (await broker.stream(stream)).messages == messages


async def claim(broker: Broker, ownership: Ownership) -> MarkedWriter:
    """LOG-0, for partition 0 of EVENTS."""
    epoch, marked = (await broker.stream("LOG-0")).epoch or "", EVENTS.marked(0, 0)
    found = await read_mark(broker, marked)
    facts = {"epoch": epoch, "found": found, "mark": found.mark, "start_seq": 0}
    return await MarkedWriter.take_over(broker, marked, ownership, **facts)


@pytest.mark.parametrize("breakage", BREAKAGES)
async def test_a_batch_interrupted_in_mid_flight_is_settled_by_its_mark_and_stored_once(
    breakage: str, nats_server: NatsServer
) -> None:
    async with lab(nats_server) as (network, far, near):
        writer = await claim(far, Ownership(1, "me", "eeeeeeee"))
        for number in range(1, 4):
            messages = [Outgoing(f"log.0.t.u{i}", b"%d" % number * 2000) for i in range(200)]
            network.to_client.delay_seconds = 0.1
            append = asyncio.create_task(writer.append(messages, number), name="append")
            await asyncio.sleep(0.02 * number)
            BREAKAGES[breakage](network)
            await asyncio.sleep(0.3)  # how long the network stays broken
            network.restore()
            if number > 1:
                network.reset()
            await asyncio.wait_for(append, 60)
            assert (await read_mark(near, EVENTS.marked(0, 0))).mark == writer.mark
        records = await whole_stream(near, "LOG-0", "log.0.>")
        assert len(records) == 600
        assert [record.payload[:1] for record in records] == [b"1"] * 200 + [b"2"] * 200 + [b"3"] * 200


async def test_a_batch_held_back_by_the_network_is_refused_when_it_arrives_after_a_take_over(
    nats_server: NatsServer,
) -> None:
    async with lab(nats_server) as (network, far, near):
        old = await claim(far, Ownership(1, "old", "e"))
        network.to_server.silence()
        late = asyncio.create_task(old.append([Outgoing("log.0.t.u", b"late")], 1), name="late")
        await eventually(lambda: any(b"late" in data for data in network.to_server.held))
        new = await claim(near, Ownership(2, "new", "e"))
        await new.append([Outgoing("log.0.t.u", b"in time")], 1)
        network.restore()
        with pytest.raises(StepDown):
            await asyncio.wait_for(late, 60)
        assert [stored.payload for stored in await whole_stream(near, "LOG-0", "log.0.>")] == [b"in time"]


async def test_publishing_while_disconnected_fails_at_once(nats_server: NatsServer) -> None:
    async with lab(nats_server) as (network, far, _):
        network.refusing = True
        network.reset()
        await eventually(lambda: not far.connected)
        with pytest.raises(Unavailable):
            far.publish("now.t.u.x", b"{}")
        with pytest.raises(Unavailable):
            await far.commit([Outgoing("log.0.t.u", b"{}")])


@pytest.mark.chaos(takes_seconds=25)
async def test_dispatchers_on_a_bad_network_to_nats_and_redis_lose_double_and_reorder_nothing(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with (
        connected(nats_server.url) as broker,
        bad_network(nats_server.port) as one,
        bad_network(nats_server.port) as other,
        bad_network(valkey.port) as redis,
    ):
        await topology.ensure(broker, "dev", overrides=FAST)
        redis_url = f"redis://127.0.0.1:{redis.port}/0"
        with dispatcher_processes(tmp_path, "", redis_url) as processes:
            for process, network in zip(processes, (one, other), strict=True):
                process.nats_url = f"nats://127.0.0.1:{network.port}"
                process.spawn()
                await eventually(lambda process=process: process.ready)
            faults, count = network_faults([one, other, redis]), 14 + int(chaos.seconds / 1.5)
            async with chaos.under_load(broker, shared=0.4, rate=150):
                drawn = await torment(chaos.rng, faults, count=count, pause_seconds=(0.1, 1.0))
            await chaos.judge(broker)
            print(drawn)


async def test_a_server_frozen_for_longer_than_pings_wait_costs_nothing_but_time(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start()
            second.start()
            async with chaos.under_load(broker, shared=0.4, rate=200) as load:
                await eventually(lambda: load.acknowledged > 100)
                nats_server.suspend()
                await eventually(
                    lambda: first.said("nats_disconnected") and second.said("nats_disconnected"), seconds=60
                )
                nats_server.resume()
                before = load.acknowledged
                await eventually(lambda: load.acknowledged > before + 200, seconds=60)
            await chaos.judge(broker)


def network_faults(networks: list[BadNetwork]) -> list[Fault]:
    def for_a_while(name: str, break_it: Callable[[BadNetwork], None]) -> Fault:
        async def inject(rng: Any) -> None:
            network = rng.choice(networks)
            break_it(network)
            await asyncio.sleep(rng.uniform(0.1, 2.0))
            network.restore()

        return Fault(name, 1, inject)

    def slow(network: BadNetwork) -> None:
        network.to_client.delay_seconds = network.to_server.delay_seconds = 0.2

    return [for_a_while(name, breakage) for name, breakage in {**BREAKAGES, "slow": slow}.items()]
