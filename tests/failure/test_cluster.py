"""Three nodes, three replicas: leaders and followers die, freeze and step down under load; logs and devices stay whole."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chaos.faults import Fault, torment
from chaos.load import Load, look
from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from engine.topology import server as topology
from ops.dev.servers import NatsCluster, NatsServer, Valkey
from seamark.protocol.subjects import log_stream
from tests.support.chaos import PARTITIONS, TIMEOUT, Chaos
from tests.support.devices import Device, devices
from tests.support.logs import connected, eventually
from tests.support.roles import dispatcher_processes, gateway_role
from tests.support.topology import Overrides

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]

R3 = Overrides(replicas=3, pin_timeout_seconds=1.0)
USERS = [f"user{number}" for number in range(24)]
TAILS = 4
FROZEN_SECONDS = 3.0
"""How long a node stands still: the length of a fault, waited for by nobody."""
Inject = Callable[[random.Random], Awaitable[None]]


async def come_back(node: NatsServer) -> None:
    node.prepare()
    node.spawn()
    await asyncio.to_thread(node.wait_ready)


def leader(cluster: NatsCluster, rng: random.Random) -> NatsServer:
    return cluster.leader_of(f"LOG-{rng.randrange(PARTITIONS)}") or rng.choice(cluster.servers)


def follower(cluster: NatsCluster, rng: random.Random) -> NatsServer:
    led = leader(cluster, rng)
    return rng.choice([node for node in cluster.servers if node is not led])


def killed(cluster: NatsCluster, choose: Callable[[NatsCluster, random.Random], NatsServer]) -> Inject:
    async def inject(rng: random.Random) -> None:
        node = await asyncio.to_thread(choose, cluster, rng)
        node.kill()
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        await come_back(node)

    return inject


def frozen(cluster: NatsCluster, choose: Callable[[NatsCluster, random.Random], NatsServer]) -> Inject:
    async def inject(rng: random.Random) -> None:
        node = await asyncio.to_thread(choose, cluster, rng)
        node.suspend()
        await asyncio.sleep(FROZEN_SECONDS)
        node.resume()

    return inject


def majority_frozen(cluster: NatsCluster) -> Inject:
    """Nothing can be stored, and nothing may be said to be."""

    async def inject(rng: random.Random) -> None:
        nodes = rng.sample(cluster.servers, 2)
        for node in nodes:
            node.suspend()
        await asyncio.sleep(FROZEN_SECONDS)
        for node in nodes:
            node.resume()

    return inject


def deposed(broker: Broker, *methods: str) -> Inject:
    async def inject(rng: random.Random) -> None:
        try:
            await broker.api(rng.choice(methods), {}, timeout_seconds=2.0)
        except BrokerError as error:
            print(f"no step-down: {error}")

    return inject


async def replicas_agree(cluster: NatsCluster) -> bool:
    """Does every node hold all of every LOG?"""
    heads = []
    for node in cluster.servers:
        streams = {stream["name"]: stream["state"]["last_seq"] for stream in node.streams()}
        heads.append({name: last for name, last in streams.items() if name.startswith("LOG-")})
    return bool(heads[0]) and heads[0] == heads[1] == heads[2]


async def look_at_each_replica(cluster: NatsCluster, broker: Broker, chaos: Chaos) -> None:
    """Any replica may answer a read: to be sure which one did, the others are frozen meanwhile."""
    states = {log_stream(p): await broker.stream(log_stream(p)) for p in range(PARTITIONS)}
    for node in cluster.servers:
        others = [other for other in cluster.servers if other is not node]
        async with connected(node.url) as local:
            for other in others:
                other.suspend()
            async with asyncio.timeout(90):
                await look(local, chaos.ledger, PARTITIONS, replica=node.server_name, states=states)
            for other in others:
                other.resume()


@pytest.mark.chaos(takes_seconds=45)
async def test_a_cluster_that_loses_leaders_and_followers_loses_doubles_and_reorders_nothing_and_resets_nobody(
    nats_cluster: NatsCluster, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    cluster = nats_cluster
    async with connected(cluster.url) as broker:
        await topology.ensure(broker, "dev", overrides=R3)
        with (
            dispatcher_processes(tmp_path, cluster.url_of("dispatcher"), valkey.url) as processes,
            gateway_role(tmp_path, cluster.url_of("gateway")) as gateway,
        ):
            for process in [*processes, gateway]:
                process.start()
            async with devices(chaos.ledger, USERS, gateway.url) as found:
                load = Load(broker, chaos.ledger, chaos.rng, USERS, shared=0.3, rate=150, budget_seconds=60)
                running = asyncio.create_task(load.run(), name="load")
                depose = [f"STREAM.LEADER.STEPDOWN.LOG-{p}" for p in range(PARTITIONS)]
                depose += [f"CONSUMER.LEADER.STEPDOWN.EVENTS.dispatch-{q}" for q in range(PARTITIONS)]
                faults = [
                    Fault("leader killed", 1, killed(cluster, leader)),
                    Fault("leader frozen", 1, frozen(cluster, leader)),
                    Fault("follower frozen", 1, frozen(cluster, follower)),
                    Fault("leader deposed", 1, deposed(broker, *depose)),
                    Fault("majority frozen", 1, majority_frozen(cluster)),
                ]
                count = len(faults) + int(chaos.seconds / 8)
                drawn = await torment(chaos.rng, faults, count=count, pause_seconds=(0.5, 2.0))
                load.stop()
                await running
                await chaos.settled(broker)
                assert min([await tail_seconds(load, found) for _ in range(TAILS)]) < 2
                await eventually(lambda: replicas_agree(cluster), seconds=60, every_seconds=0.25)
                records = await chaos.judge_devices(broker, found)
                assert {reason for device in found for reason in device.resets} == set()
            for process in [*processes, gateway]:
                process.kill()
        await look_at_each_replica(cluster, broker, chaos)
        chaos.verdict()
    print(f"{drawn}; {load.acknowledged} of {load.sent} acknowledged, {records} records")


async def tail_seconds(load: Load, found: list[Device]) -> float:
    """How long an event takes to every device, with nothing after it to reveal it. On a machine that stalls, some take longer."""
    tail = await load.publish("tail", USERS)
    published = time.monotonic()
    await eventually(lambda: {device.last_event for device in found} == {tail}, seconds=60)
    return time.monotonic() - published
