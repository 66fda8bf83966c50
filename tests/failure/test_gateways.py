"""Gateways that are killed, brokers that lead no more or lag: devices still get their whole log, once and in order."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from engine.topology import server as topology
from ops.dev.child import free_port
from ops.dev.servers import NatsCluster, NatsServer
from seamark.protocol.subjects import encode_token, log_stream, log_subject, partition_of
from tests.support.fleet import FleetDevice, fleet
from tests.support.gatewayprocess import GatewayProcess, gateway_process
from tests.support.gateways import PARTITIONS
from tests.support.logs import connected, eventually
from tests.support.tokens import SECRET
from tests.support.topology import Overrides

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

USERS = [f"user{number}" for number in range(60)]
FAST_TIMES = {"ping_seconds": 5.0, "pong_seconds": 5.0}
TAILS = 4


def place(user: str) -> tuple[str, str]:
    """Stream and subject of a user's log."""
    partition = partition_of(encode_token("default"), encode_token(user), PARTITIONS)
    return log_stream(partition), log_subject(partition, "default", user)


async def append(broker: Broker, rng: random.Random, count: int) -> None:
    """Append records to random logs, some at a time, however long the broker takes."""
    slots = asyncio.Semaphore(32)

    async def one(number: int) -> None:
        async with slots:
            _, subject = place(rng.choice(USERS))
            await broker.append(subject, b'{"id":"r%d","data":{}}' % number, msg_id=f"r{number}", budget_seconds=60)
            await asyncio.sleep(rng.uniform(0, 0.05))

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


async def has_its_log(broker: Broker, device: FleetDevice) -> bool:
    stream, subject = place(device.user)
    try:
        return device.seqs == [stored.seq for stored in await whole_stream(broker, stream, subject)]
    except BrokerError:  # still reconnecting, or electing
        return False


async def judge(broker: Broker, devices: list[FleetDevice], *, seconds: float = 60.0) -> None:
    """Every device has exactly its log, and was never told that something could not be continued."""
    for device in devices:
        await eventually(lambda device=device: has_its_log(broker, device), seconds=seconds, every_seconds=0.1)
    assert [fault for device in devices for fault in device.faults] == []
    assert {reason for device in devices for reason in device.resets} == set()


class Gateways:
    """Processes that share a port; one that was killed comes back."""

    def __init__(self, stack: ExitStack, url: str, log: Path, count: int) -> None:
        self.port = free_port("127.0.0.1")
        self._start: Callable[[], GatewayProcess] = lambda: stack.enter_context(
            gateway_process(url, log, port=self.port, reuse_port=True, times=FAST_TIMES, options={"jwt_secret": SECRET})
        )
        self.processes = [self._start() for _ in range(count)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def kill_and_restart(self, index: int) -> None:
        self.processes[index].process.kill()
        self.processes[index] = await asyncio.to_thread(self._start)


@asynccontextmanager
async def tormented(faults: Callable[[], AsyncIterator[None]]) -> AsyncIterator[None]:
    """Faults go on until the body ends; the last one is healed."""

    async def torment() -> None:
        async for _ in faults():
            if over.is_set():
                return

    over = asyncio.Event()
    task = asyncio.create_task(torment(), name="faults")
    try:
        yield
    finally:
        over.set()
        await task


async def test_killed_gateways_cost_no_record_none_twice_and_none_out_of_order(
    nats_server: NatsServer, tmp_path: Path, rng: random.Random
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev")
        with ExitStack() as stack:
            gateways = await asyncio.to_thread(Gateways, stack, nats_server.url, tmp_path / "log", 2)
            async with fleet(USERS, gateways.url, rng) as devices:

                async def kills() -> AsyncIterator[None]:
                    while True:
                        await asyncio.sleep(rng.uniform(0.2, 0.8))
                        await gateways.kill_and_restart(rng.randrange(2))
                        yield

                async with tormented(kills):
                    await append(broker, rng, 4_000)
                await judge(broker, devices)
                assert sum(device.connects for device in devices) > len(devices)  # or the kills hit nobody


async def test_a_killed_broker_costs_no_record_none_twice_and_none_out_of_order(
    nats_server: NatsServer, tmp_path: Path, rng: random.Random
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev")
        with ExitStack() as stack:
            gateways = await asyncio.to_thread(Gateways, stack, nats_server.url, tmp_path / "log", 1)
            async with fleet(USERS, gateways.url, rng) as devices:

                async def kills() -> AsyncIterator[None]:
                    while True:
                        await asyncio.sleep(rng.uniform(0.5, 1.5))
                        nats_server.kill()
                        await asyncio.sleep(rng.uniform(0, 0.5))
                        await asyncio.to_thread(nats_server.start)
                        yield

                async with tormented(kills):
                    await append(broker, rng, 2_000)
                await judge(broker, devices)


@pytest.mark.chaos(takes_seconds=35)
async def test_on_a_cluster_lagging_followers_and_lost_leaders_cause_no_false_reset_and_the_tail_arrives(
    nats_cluster: NatsCluster, tmp_path: Path, rng: random.Random
) -> None:
    async with connected(nats_cluster.url) as broker:
        await topology.ensure(broker, "dev", overrides=Overrides(replicas=3))
        with ExitStack() as stack:
            gateways = await asyncio.to_thread(Gateways, stack, nats_cluster.url_of("gateway"), tmp_path / "log", 1)
            async with fleet(USERS, gateways.url, rng) as devices:

                async def faults() -> AsyncIterator[None]:
                    while True:
                        stream = log_stream(rng.randrange(PARTITIONS))
                        leader = await asyncio.to_thread(nats_cluster.leader_of, stream)
                        if leader is None:
                            await asyncio.sleep(0.2)  # an election is under way: asked again until the test is over
                            yield
                            continue
                        if rng.random() < 0.5:
                            leader.kill()
                            await asyncio.sleep(rng.uniform(0.5, 2))
                            await asyncio.to_thread(leader.start)
                        else:
                            follower = rng.choice([server for server in nats_cluster.servers if server is not leader])
                            follower.suspend()
                            await asyncio.sleep(3)  # how long it lags behind
                            follower.resume()
                        for device in rng.sample(devices, 20):
                            await device.reconnect()
                        await asyncio.sleep(rng.uniform(1, 3))
                        yield

                async with tormented(faults):
                    began = time.monotonic()
                    number = 0
                    while time.monotonic() - began < 25:
                        await append_some(broker, rng, number)
                        number += 100
                await eventually(lambda: all(device.live.is_set() for device in devices), seconds=60)
                await judge(broker, devices)
                assert min([await tail_seconds(broker, devices[0], number) for number in range(TAILS)]) < 2


async def tail_seconds(broker: Broker, device: FleetDevice, number: int) -> float:
    """How long a record takes to a device, with nothing after it to reveal it. On a machine that stalls, some take longer."""
    _, subject = place(device.user)
    ack = await broker.append(subject, b'{"id":"tail"}', msg_id=f"tail{number}")
    stored = time.monotonic()
    await eventually(lambda: device.seqs[-1:] == [ack.seq], seconds=60)
    return time.monotonic() - stored


async def append_some(broker: Broker, rng: random.Random, first: int) -> None:
    """A hundred records, whatever elections there are meanwhile."""

    async def one(number: int) -> None:
        _, subject = place(rng.choice(USERS))
        await broker.append(subject, b'{"id":"r%d"}' % number, msg_id=f"r{number}", budget_seconds=60)

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            for number in range(first, first + 100):
                group.create_task(one(number))
