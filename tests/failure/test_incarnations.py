"""Streams change their incarnation under running dispatchers: partitions stop, name the repair, and go on after it."""

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from chaos.load import Load
from engine import topology
from engine.jetstream import Broker
from seamark.dev.servers import NatsServer, Valkey
from tests.support.chaos import PARTITIONS, Chaos
from tests.support.logs import FAST, connected, eventually
from tests.support.roles import ROOT, DispatcherProcess, dispatcher_processes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]

STOPPED = "seamark_partition_stopped"


@asynccontextmanager
async def under_load(broker: Broker, chaos: Chaos, prefix: str = "e"):
    """Publishers at work; all their answers are in the ledger at the end."""
    load = Load(broker, chaos.ledger, chaos.rng, chaos.users, shared=0.4, rate=150, prefix=prefix)
    running = asyncio.create_task(load.run(), name="load")
    try:
        yield load
    finally:
        load.stop()
        await running


def repair_is_named(process: DispatcherProcess, why: str) -> bool:
    said = process.said("partition stopped until it is repaired")
    return any(why in line["why"] and "seamark topology repair" in line["remedy"] for line in said)


async def repaired(nats_server: NatsServer, valkey: Valkey, *positions: str) -> None:
    """What the dispatchers' log told the operator to run."""
    at = [word for position in positions for word in ("--at", position)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "seamark", "topology", "repair", "--yes", *at),
        cwd=ROOT,
        env={**os.environ, "SEAMARK_NATS_URL": nats_server.url, "SEAMARK_REDIS_URL": valkey.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, said.decode()


async def test_events_under_a_new_epoch_stop_every_partition_until_the_repair_and_nothing_is_lost_or_doubled(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start()
            second.start()
            async with under_load(broker, chaos) as load:
                await eventually(lambda: load.acknowledged > 150)
                await topology.restore(broker, ["EVENTS"])
                await eventually(lambda: first.metric(STOPPED) + second.metric(STOPPED) >= PARTITIONS, seconds=20)
                assert repair_is_named(first, "EVENTS") or repair_is_named(second, "EVENTS")
            first.stop()
            second.stop()
            await repaired(nats_server, valkey)
            second.start()
            async with under_load(broker, chaos, "later") as load:
                await eventually(lambda: load.acknowledged > 50)
            await chaos.judge(broker)


async def test_a_log_under_a_new_epoch_stops_who_writes_to_it_until_the_repair_and_nothing_is_lost_or_doubled(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start()
            second.start()
            async with under_load(broker, chaos) as load:
                await eventually(lambda: load.acknowledged > 150)
                await topology.restore(broker, ["LOG-2"])
                # Its own partition at once; the others have events for users in it.
                await eventually(lambda: first.metric(STOPPED) + second.metric(STOPPED) >= PARTITIONS, seconds=20)
                assert repair_is_named(first, "LOG-2") or repair_is_named(second, "LOG-2")
            first.stop()
            second.stop()
            await repaired(nats_server, valkey)
            second.start()
            async with under_load(broker, chaos, "later") as load:
                await eventually(lambda: load.acknowledged > 50)
            await chaos.judge(broker)


async def test_a_change_is_noticed_without_any_event_to_dispatch(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url, 1) as (only,):
            only.start()
            await Load(broker, chaos.ledger, chaos.rng, chaos.users).run(60)
            await chaos.settled(broker)
            await topology.restore(broker, ["EVENTS"])
            await eventually(lambda: only.metric(STOPPED) == PARTITIONS, seconds=20)


async def test_recreated_events_stop_every_partition_and_none_of_the_new_ones_is_taken_for_an_old_one(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start()
            second.start()
            await Load(broker, chaos.ledger, chaos.rng, chaos.users, shared=0.4).run(300)
            await chaos.settled(broker)
            await broker.api("STREAM.DELETE.EVENTS")
            await topology.ensure(broker, "dev", overrides=FAST)
            # The new stream outgrows the old one at once, so that the old positions lie inside it.
            async with under_load(broker, chaos, "new") as load:
                load.rate = 0
                await eventually(lambda: load.acknowledged > 600, seconds=30)
                await eventually(lambda: first.metric(STOPPED) + second.metric(STOPPED) >= PARTITIONS, seconds=20)
                assert repair_is_named(first, "EVENTS") or repair_is_named(second, "EVENTS")
            first.stop()
            second.stop()
            await repaired(nats_server, valkey, "first")
            first.start()
            await chaos.judge(broker)


async def test_a_recreated_log_stops_its_partitions_and_is_filled_again_from_where_the_operator_says(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start()
            second.start()
            # Only personal events: what the lost log held is all in its own partition of EVENTS.
            load = Load(broker, chaos.ledger, chaos.rng, chaos.users, shared=0)
            await load.run(200)
            await chaos.settled(broker)
            await broker.api("STREAM.DELETE.LOG-1")
            await topology.ensure(broker, "dev", overrides=FAST)
            await load.run(200)
            await eventually(lambda: first.metric(STOPPED) + second.metric(STOPPED) >= 1, seconds=20)
            assert repair_is_named(first, "LOG-1") or repair_is_named(second, "LOG-1")
            first.stop()
            second.stop()
            await repaired(nats_server, valkey, "1=first")
            second.start()
            await Load(broker, chaos.ledger, chaos.rng, chaos.users, prefix="later").run(50)
            await chaos.judge(broker)


async def test_a_log_put_back_to_an_older_backup_behind_a_dispatchers_back_stops_it_as_soon_as_it_is_said(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    """The dispatcher finds marks of its own that are older than those it has confirmed."""
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url, 1) as (only,):
            only.start()
            load = Load(broker, chaos.ledger, chaos.rng, chaos.users, shared=0)
            await load.run(200)
            await chaos.settled(broker)
            state = await broker.stream("LOG-1")
            await load.run(100)
            await chaos.settled(broker)
            for seq in range((await broker.stream("LOG-1")).last_seq, state.last_seq, -1):
                await broker.api("STREAM.MSG.DELETE.LOG-1", {"seq": seq})
            await load.run(50)
            await topology.restore(broker, ["LOG-1"])
            await eventually(lambda: repair_is_named(only, "LOG-1"), seconds=15)
            assert only.metric(STOPPED) >= 1


async def test_what_is_no_mark_on_a_marks_subject_stops_the_partition_and_names_the_message_to_delete(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url, 1) as (only,):
            only.start()
            load = Load(broker, chaos.ledger, chaos.rng, chaos.users, shared=0.4)
            await load.run(100)
            await chaos.settled(broker)
            ack = await broker.append("mark.3.3", b"oops")
            await load.run(100)
            await eventually(lambda: only.metric(STOPPED) == 1)
            [said] = only.said("partition stopped until it is repaired")
            assert said["remedy"] == f"Delete message {ack.seq} of LOG-3: the mark before it counts then"
            await broker.api("STREAM.MSG.DELETE.LOG-3", {"seq": ack.seq})
            await chaos.judge(broker)
            await eventually(lambda: only.metric(STOPPED) == 0)
