"""Publish, dispatch, deliver, while every process of the stack is killed in turn: logs and devices hold every event once."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chaos.faults import Fault, kill_one, torment
from chaos.load import Load
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Server, Valkey
from tests.support.chaos import SECONDS, TIMEOUT, Chaos
from tests.support.devices import cut_now_and_then, devices
from tests.support.logs import FAST, connected
from tests.support.network import bad_network
from tests.support.overlays import QUICK_DISK
from tests.support.roles import dispatcher_processes, gateway_role

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT), pytest.mark.overlay(QUICK_DISK)]

PUBLISHES = 6_000 + int(SECONDS * 620)
USERS = [f"user{number}" for number in range(200)]


def restart(server: Server) -> Callable[[random.Random], Awaitable[None]]:
    """SIGKILL, some time without it, and up again with its data."""

    async def inject(rng: random.Random) -> None:
        server.kill()
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        server.prepare()
        server.spawn()
        await asyncio.to_thread(server.wait_ready)

    return inject


@pytest.mark.chaos(takes_seconds=35)
async def test_every_acknowledged_event_is_in_one_record_and_every_device_gets_its_log(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with (
            dispatcher_processes(tmp_path, nats_server.url, valkey.url) as processes,
            gateway_role(tmp_path, nats_server.url) as gateway,
        ):
            for process in [*processes, gateway]:
                process.start()
            async with (
                bad_network(gateway.gateway_port) as network,
                devices(chaos.ledger, USERS, f"http://127.0.0.1:{network.port}") as found,
            ):
                load = Load(broker, chaos.ledger, chaos.rng, USERS, shared=0.05, audience_max=6, rate=800)
                running = asyncio.create_task(load.run(PUBLISHES), name="load")
                tunnels = asyncio.create_task(cut_now_and_then(network, chaos.rng, (0.01, 0.1)), name="tunnels")
                faults = [
                    Fault("nats-server", 1, restart(nats_server)),
                    Fault("dispatcher", 1, kill_one(processes, lambda process, rng: process.spawn())),
                    Fault("gateway", 1, kill_one([gateway], lambda process, rng: process.spawn())),
                ]
                drawn = await torment(chaos.rng, faults, until=running.done, pause_seconds=(0.5, 2.5))
                await running
                tunnels.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await tunnels
                for process in [*processes, gateway]:
                    if not process.alive:
                        process.spawn()
                records = await chaos.judge_devices(broker, found)
                reconnects = sum(device.connection.reconnects for device in found)
                assert [device.resets for device in found if device.resets] == []
    print(f"{drawn}; {load.acknowledged} of {load.sent} acknowledged, {records} records, {reconnects} reconnects")
    assert load.acknowledged > 0.5 * load.sent
    assert reconnects > len(found), "the tunnels hit nobody"
