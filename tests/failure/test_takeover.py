"""Two dispatchers, one of them frozen or killed at the worst moment: nothing is lost, doubled or out of order."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from chaos.checker import check
from chaos.faults import Fault, kill_one, stop_one, suspend_one, torment
from chaos.ledger import Ledger
from chaos.load import Load, drained, look
from engine import topology
from engine.errors import BrokerError
from engine.jetstream import Broker
from seamark.dev.servers import NatsServer, Valkey
from tests.support.dispatchers import DispatcherProcess, dispatcher_processes
from tests.support.logs import FAST, connected, eventually

pytestmark = [pytest.mark.timeout(180)]

PARTITIONS = 4
USERS = [f"user{i}" for i in range(40)]
SEED = int(os.environ.get("SEAMARK_CHAOS_SEED") or random.randrange(1 << 32))


async def judge(broker: Broker, ledger: Ledger, folder: Path) -> int:
    """Wait until all is applied and check the whole history; the number of records."""

    async def all_applied() -> bool:
        try:
            return await drained(broker, PARTITIONS)
        except BrokerError:
            return False

    await eventually(all_applied, seconds=40, every_seconds=0.1)
    records = await look(broker, ledger, PARTITIONS)
    violations = check(ledger.lines)
    ledger.dump(folder / "ledger.jsonl")
    assert violations == [], f"seed {SEED}: {len(violations)} violations, the first: {violations[:5]}"
    return records


async def test_a_suspended_owner_that_wakes_up_is_refused_and_nothing_is_lost_doubled_or_reordered(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    ledger, rng = Ledger(), random.Random(SEED)
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            # It freezes with a batch planned and claimed, the moment before it is written to the LOG.
            first.start(fail_point="before-append:120:stop")
            load = Load(broker, ledger, rng, USERS, shared=0.4, rate=300)
            await load.run(30)
            await eventually(lambda: drained(broker, PARTITIONS), seconds=20)
            second.start()
            await load.run(600)
            await eventually(lambda: first.suspended)
            await eventually(lambda: second.metric("seamark_partition_owned") == PARTITIONS, seconds=20)
            await eventually(lambda: drained(broker, PARTITIONS), seconds=20)
            assert not first.said("stepping down")
            first.resume()
            await load.run(200)
            await eventually(lambda: first.metric("seamark_partition_step_downs_total") > 0, seconds=15)
            assert first.metric("seamark_dispatcher_append_retries_total", reason="10071") > 0
            records = await judge(broker, ledger, tmp_path)
    print(f"seed {SEED}: {load.acknowledged} events, {records} records")


@pytest.mark.parametrize(
    "fail_point",
    [
        "between-foreign-and-home",
        "between-foreign-and-home:7",
        "after-commit-before-answer:1",
        "after-commit-before-answer:9",
        "after-claims-before-append:3",
        "before-append:11",
        "after-take-over:2",
    ],
)
async def test_an_owner_killed_at_a_fail_point_leaves_nothing_lost_doubled_or_reordered(
    fail_point: str, nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    ledger, rng = Ledger(), random.Random(SEED)
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start(fail_point=fail_point)
            load = Load(broker, ledger, rng, USERS, shared=0.4, rate=300)
            await load.run(150)
            await eventually(lambda: first.exit_code == -9, seconds=20)
            second.start()
            await load.run(150)
            await judge(broker, ledger, tmp_path)


async def test_fifty_deaths_at_random_moments_leave_nothing_lost_doubled_or_reordered(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    ledger, rng = Ledger(), random.Random(SEED)
    deaths = max(50, int(float(os.environ.get("SEAMARK_CHAOS_SECONDS") or 0)))
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url, 3) as processes:
            for process in processes:
                process.spawn()
            faults = [
                Fault("kill", 44, kill_one(processes, start_somehow)),
                Fault("stop", 3, stop_one(processes, start_somehow)),
                Fault("suspend", 3, suspend_one(processes, (0.5, 2.5))),
            ]
            load = Load(broker, ledger, rng, USERS, shared=0.4, rate=150)
            running = asyncio.create_task(load.run(), name="load")
            drawn = await torment(rng, faults, count=deaths + 6, pause_seconds=(0.2, 1.4))
            load.stop()
            await running
            for process in processes:
                if not process.alive:
                    process.spawn()
            records = await judge(broker, ledger, tmp_path)
            print(f"{drawn}, {load.acknowledged} of {load.sent} events acknowledged, {records} records")


def start_somehow(process: DispatcherProcess, rng: random.Random) -> None:
    """Every other one gets a fail point to die at by itself, and lies dead until it is drawn again."""
    point = rng.choice(["before-append", "between-foreign-and-home", "after-commit-before-answer", "after-take-over"])
    process.spawn(fail_point=f"{point}:{rng.randint(1, 30)}" if rng.random() < 0.3 else "")
