"""Gateways are replaced one after the other, as a Deployment of the chart does it, under two thousand sessions."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from engine.broker.jetstream import Broker
from engine.topology import server as topology
from gateway.limits import DRAIN_SPREAD_MS
from ops.cli.gateway import SHARED_VARIABLE
from ops.dev.servers import NatsServer
from seamark.protocol.subjects import encode_token, log_subject, partition_of
from tests.support.charts import Object, named, needs_helm, objects
from tests.support.fleet import fleet
from tests.support.gateways import PARTITIONS
from tests.support.logs import connected, eventually
from tests.support.overlays import QUICK_DISK
from tests.support.roles import GatewayRole
from tests.support.waiting import wait_for

pytestmark = [needs_helm, pytest.mark.chaos(takes_seconds=60), pytest.mark.timeout(240)]

SESSIONS: Final = 2000
USERS: Final = [f"user{number}" for number in range(SESSIONS)]
RECORDS_PER_SECOND: Final = 100


class Rolled(GatewayRole):
    """A gateway's pod: the rendered command line, on the address that all pods of a Service share."""

    def __init__(self, name: str, folder: Path, nats_url: str, port: int, container: Object) -> None:
        super().__init__(name, folder, nats_url)
        self.gateway_port = port
        self._words = container["command"]

    def command(self) -> list[str]:
        assert self._words[0] == "seamark"
        return ["ops", *self._words[1:]]

    def settings(self) -> dict[str, str]:
        return super().settings() | {SHARED_VARIABLE: "1"}


@contextlib.asynccontextmanager
async def records(broker: Broker, rng: random.Random) -> AsyncIterator[dict[str, list[int]]]:
    """What is appended to each user's log meanwhile, by its sequence."""
    stored: dict[str, list[int]] = defaultdict(list)
    over = asyncio.Event()

    async def append() -> None:
        number = 0
        while not over.is_set():
            user = rng.choice(USERS)
            partition = partition_of(encode_token("default"), encode_token(user), PARTITIONS)
            subject = log_subject(partition, "default", user)
            ack = await broker.append(subject, b'{"id":"r%d","data":{}}' % number, msg_id=f"r{number}")
            stored[user].append(ack.seq)
            number += 1
            await asyncio.sleep(1 / RECORDS_PER_SECOND)  # the rate of the load

    task = asyncio.create_task(append(), name="records")
    try:
        yield stored
        over.set()
        await task
    finally:
        task.cancel()


@pytest.mark.overlay(QUICK_DISK)
async def test_two_thousand_sessions_lose_nothing_and_come_back_spread_as_they_are_told(
    nats_server: NatsServer, tmp_path: Path, rng: random.Random
) -> None:
    deployment = named(objects(tmp_path), "Deployment", "prod-seamark-gateway")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    spec = deployment["spec"]["template"]["spec"]
    [container] = spec["containers"]
    grace_seconds = spec["terminationGracePeriodSeconds"] - container["lifecycle"]["preStop"]["sleep"]["seconds"]
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev")
        first = GatewayRole("gateway-0", tmp_path, nats_server.url)
        pods = [
            Rolled(f"gateway-{number}", tmp_path, nats_server.url, first.gateway_port, container) for number in range(4)
        ]
        try:
            for pod in pods[:2]:
                await asyncio.to_thread(pod.start)
            async with fleet(USERS, first.url, rng, patient=True) as devices:
                assert all(pod.metric("seamark_gateway_sessions") > SESSIONS / 5 for pod in pods[:2]), "both have some"
                async with records(broker, rng) as stored:
                    await eventually(lambda: len(stored) > RECORDS_PER_SECOND)
                    for old, new in zip(pods[:2], pods[2:], strict=True):
                        await asyncio.to_thread(new.start)
                        old._child.send(signal.SIGTERM)
                        await asyncio.to_thread(
                            wait_for, lambda old=old: not old.alive, seconds=grace_seconds, said=old.log_tail
                        )
                        assert old.exit_code == 0, old.log_tail()
                    await eventually(lambda: all(device.live.is_set() for device in devices), seconds=60)
                await eventually(
                    lambda: all(device.seqs == stored.get(device.user, []) for device in devices), seconds=60
                )
        finally:
            for pod in pods:
                pod.kill()
    assert [fault for device in devices for fault in device.faults] == []
    assert {reason for device in devices for reason in device.resets} == set(), "each went on from its cursor"
    assert all(device.told_ms for device in devices), "nobody was cut off without a word"
    told = [waits for device in devices for waits in device.told_ms]
    fifths = [sum(part <= waits * 5 // (DRAIN_SPREAD_MS + 1) < part + 1 for waits in told) for part in range(5)]
    assert all(len(told) / 10 < fifth < len(told) * 3 / 10 for fifth in fifths), fifths
