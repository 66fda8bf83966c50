"""Operators and publishers who do what nobody should: consumers deleted, reset and unpinned, forged headers, trimmed events."""

import asyncio
import random
from pathlib import Path

import pytest

from chaos.faults import Fault, torment
from chaos.ledger import Ledger
from chaos.load import Load
from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from engine.partition.pulls import GROUP
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.chaos import PARTITIONS, TIMEOUT, Chaos
from tests.support.logs import FAST, PATIENT, connected, eventually
from tests.support.roles import DispatcherProcess, dispatcher_processes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]


async def test_consumers_deleted_reset_and_unpinned_under_load_cost_nothing_but_time(
    broker: Broker, first: DispatcherProcess, second: DispatcherProcess, chaos: Chaos
) -> None:
    faults = [
        Fault("delete", 1, lambda rng: deleted(broker, rng)),
        Fault("reset", 2, lambda rng: reset(broker, rng)),
        Fault("unpin", 2, lambda rng: unpinned(broker, rng)),
    ]
    async with chaos.under_load(broker, shared=0.3, rate=200):
        drawn = await torment(chaos.rng, faults, count=20 + int(chaos.seconds), pause_seconds=(0.05, 0.6))
    await chaos.judge(broker)
    print(drawn)


async def deleted(broker: Broker, rng: random.Random) -> None:
    await broker.api(f"CONSUMER.DELETE.EVENTS.dispatch-{rng.randrange(PARTITIONS)}")
    await asyncio.sleep(rng.uniform(0.0, 0.5))
    await topology.ensure(broker, "dev", overrides=FAST)


async def reset(broker: Broker, rng: random.Random) -> None:
    """Back to the first event, somewhere into the past, or past the last one."""
    last = (await broker.stream("EVENTS")).last_seq
    seq = rng.choice([1, rng.randint(1, last), last + 1, last + 100])
    try:
        await broker.api(f"CONSUMER.RESET.EVENTS.dispatch-{rng.randrange(PARTITIONS)}", {"seq": seq})
    except BrokerError as error:
        print(f"no reset to {seq}: {error}")


async def unpinned(broker: Broker, rng: random.Random) -> None:
    await broker.api(f"CONSUMER.UNPIN.EVENTS.dispatch-{rng.randrange(PARTITIONS)}", {"group": GROUP})


@pytest.mark.parametrize("header", ["Nats-Pin-Id", "Nats-Sequence", "Nats-Last-Sequence", "Status", "Nats-Subject"])
async def test_headers_that_a_publisher_forges_confuse_nobody(
    header: str, nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=PATIENT)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url, 1) as (only,):
            only.start()
            load = chaos.load(broker, headers={header: "17"})
            await load.run(100)
            await chaos.judge(broker)
            assert only.metric("seamark_partition_take_overs_total") == PARTITIONS


async def test_events_trimmed_before_anybody_read_them_are_counted_and_the_rest_is_dispatched(
    broker: Broker, only: DispatcherProcess, chaos: Chaos
) -> None:
    await chaos.load(broker).run(50)
    await chaos.settled(broker)
    only.stop()
    await Load(broker, Ledger(), chaos.rng, chaos.users, prefix="gone").run(50)
    await broker.api("STREAM.PURGE.EVENTS")
    await chaos.load(broker, prefix="later").run(50)
    only.start()
    await chaos.judge(broker)
    await eventually(lambda: only.metric("seamark_partition_possibly_trimmed_total") >= 1)
    await eventually(lambda: only.said("messages_may_be_trimmed_unread"))


@pytest.mark.parametrize("commits", [2, 3, 5, 8, 11])
async def test_an_owner_killed_inside_an_event_for_ten_thousand_users_leaves_one_record_for_each(
    commits: int, nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    chaos.users = [f"user{number}" for number in range(10_000)]
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            load = chaos.load(broker)
            await load.publish("room", chaos.users)
            await load.publish("room", chaos.users[:20])
            # Of some twenty commits: claims of marks, batches inside the event, the last ones.
            first.spawn(fail_point=f"after-commit-before-answer:{commits}")
            await eventually(lambda: first.exit_code == -9, seconds=60)
            second.start()
            assert await chaos.judge(broker) == 10_020
