"""Two dispatchers, one of them frozen or killed at the worst moment: nothing is lost, doubled or out of order."""

import asyncio
import random
import time
from pathlib import Path

import pytest

from chaos.faults import Fault, kill_one, stop_one, suspend_one, torment
from engine.broker.jetstream import Broker
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.chaos import PARTITIONS, TIMEOUT, Chaos
from tests.support.logs import FAST, connected, eventually
from tests.support.roles import DispatcherProcess, dispatcher_processes
from tests.support.topology import Overrides

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]

PIN_SECONDS = 8.0
"""Of a hand-over that is timed: long beside what a machine that stalls adds to one."""


async def test_a_suspended_owner_that_wakes_up_is_refused_and_nothing_is_lost_doubled_or_reordered(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            # It freezes with a batch planned and claimed, the moment before it is written to the LOG.
            first.start(fail_point="before-append:120:stop")
            # A slow machine makes fewer rounds of more events: how many events it takes to freeze is for it to say.
            # It is alone until then: beside another one, it could lose all partitions before it gets there.
            async with chaos.under_load(broker, shared=0.4, rate=300) as load:
                await eventually(lambda: first.suspended, seconds=60)
                second.start()
                await eventually(lambda: load.acknowledged >= 600, seconds=60)
            await eventually(lambda: second.metric("seamark_partition_owned") == PARTITIONS, seconds=60)
            await chaos.settled(broker)
            first.resume()
            await load.run(200)
            await eventually(lambda: first.metric("seamark_partition_step_downs_total") > 0, seconds=60)
            await eventually(lambda: first.metric("seamark_dispatcher_append_retries_total", reason="10071") > 0)
            await chaos.judge(broker)


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
    fail_point: str, nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.spawn(fail_point=fail_point)
            async with chaos.under_load(broker, shared=0.4, rate=300) as load:
                await eventually(lambda: first.exit_code == -9 and load.acknowledged >= 150, seconds=60)
            second.start()
            await load.run(150)
            await chaos.judge(broker)


async def test_an_owner_killed_after_a_dead_letter_leaves_one_dead_letter_for_each_invalid_event(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start(fail_point="after-dead-letter:5")
            for number in range(20):
                await broker.append(f"events.default.user{number}.demo.bad", b"{no json")
            load = chaos.load(broker)
            await load.run(50)
            await eventually(lambda: first.exit_code == -9, seconds=60)
            second.start()
            await chaos.judge(broker)
            dead = await broker.stream("DEAD-LETTERS")
            assert dead.messages == dead.last_seq == 20


async def test_an_orderly_end_hands_over_at_once_and_a_death_within_the_pins_time_out(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=Overrides(replicas=1, pin_timeout_seconds=PIN_SECONDS))
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start()
            async with chaos.under_load(broker, shared=0.4, rate=200):
                await owns_all(first)
                second.start()
                ending, other = first, second
                for _ in range(3):  # a machine that stalls may delay one of them, or two
                    await eventually(lambda: readers(nats_server) == 2 * PARTITIONS)  # the other one stands by
                    await asyncio.to_thread(ending.stop)
                    assert ending.exit_code == 0
                    seconds = await owns_all(other)
                    ending.start()
                    # The pins were given back; else it would be their time-out, less what the end took.
                    if seconds < 0.3 * PIN_SECONDS:
                        break
                    ending, other = other, ending
                else:
                    pytest.fail("no orderly end handed over at once")
                await eventually(lambda: readers(nats_server) == 2 * PARTITIONS)
                other.kill()
                assert await owns_all(ending) < 2 * PIN_SECONDS
            await chaos.judge(broker)


async def owns_all(process: DispatcherProcess) -> float:
    """Wait until it owns every partition; how long that took."""
    began = time.monotonic()
    await eventually(lambda: process.metric("seamark_partition_owned") == PARTITIONS, seconds=60)
    return time.monotonic() - began


def readers(server: NatsServer) -> int:
    """How many dispatchers there are for every partition, all together: each wants to hear who loses its pin."""
    connections = server.monitor("/connz?subs=1").get("connections", [])
    subjects = [subject for one in connections for subject in one.get("subscriptions_list") or []]
    return sum(subject.startswith("$JS.EVENT.ADVISORY.CONSUMER.UNPINNED.EVENTS.") for subject in subjects)


LIES = {
    "no-expectation": ("before-append:60:stop", "duplicate"),
    "no-skip": ("between-foreign-and-home:9", "duplicate"),
    "home-first": ("after-commit-before-answer:40", "lost"),
}
"""Where a dispatcher that lacks this safeguard is stopped, and the invariant that it breaks then."""


@pytest.mark.parametrize("lie", LIES)
async def test_a_dispatcher_without_one_of_its_safeguards_is_convicted_of_what_they_prevent(
    lie: str, nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    """These scenarios have teeth: the same deaths under a dispatcher with a mistake in it break a promise."""
    point, broken_promise = LIES[lie]
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            for process in (first, second):
                process.lie = lie
            first.start(fail_point=point)
            # It is alone until it is there: beside another one, it could lose all partitions before.
            async with chaos.under_load(broker, shared=0.9, rate=300) as load:
                await eventually(lambda: broken(first), seconds=60)
                second.start()
                await eventually(lambda: load.acknowledged >= 300, seconds=60)
            await chaos.settled(broker)
            first.resume()
            await eventually(lambda: is_broken(chaos, broker, broken_promise), seconds=60, every_seconds=0.2)


async def is_broken(chaos: Chaos, broker: Broker, promise: str) -> bool:
    found = {violation.invariant for violation in await chaos.violations(broker)}
    print(sorted(found))
    return promise in found


def broken(process: DispatcherProcess) -> bool:
    """Has it frozen or died at its fail point?"""
    return process.suspended or not process.alive


@pytest.mark.chaos(takes_seconds=45)
async def test_fifty_deaths_at_random_moments_leave_nothing_lost_doubled_or_reordered(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
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
            async with chaos.under_load(broker, shared=0.4, rate=150) as load:
                deaths = max(56, int(chaos.seconds))
                drawn = await torment(chaos.rng, faults, count=deaths, pause_seconds=(0.1, 0.9))
            for process in processes:
                if not process.alive:
                    process.spawn()
            records = await chaos.judge(broker)
            print(f"{drawn}, {load.acknowledged} of {load.sent} events acknowledged, {records} records")


def start_somehow(process: DispatcherProcess, rng: random.Random) -> None:
    """Every third one gets a fail point to die at by itself, and lies dead until it is drawn again."""
    point = rng.choice(["before-append", "between-foreign-and-home", "after-commit-before-answer", "after-take-over"])
    process.spawn(fail_point=f"{point}:{rng.randint(1, 30)}" if rng.random() < 0.3 else "")
