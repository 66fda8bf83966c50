"""Streams change their incarnation under running dispatchers: they go on where it is known what positions mean, or stop."""

import asyncio

import pytest

from engine.broker.jetstream import Broker
from engine.dispatch.source import EVENTS
from engine.log.writer import read_mark
from engine.topology import server as topology
from tests.support.chaos import PARTITIONS, Chaos
from tests.support.commands import seamark
from tests.support.logs import FAST, eventually
from tests.support.roles import DispatcherProcess

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

STOPPED = "seamark_partition_stopped"
STOP_SAID = "partition_stopped"


def stopped(*processes: DispatcherProcess) -> float:
    """How many partitions wait for an operator."""
    return sum(process.metric(STOPPED) for process in processes)


async def repair_is_named(why: str, *processes: DispatcherProcess) -> None:
    """The log tells to repair; where a stream was missing for a moment only at the next look, ten seconds later."""

    def said() -> bool:
        lines = [line for process in processes for line in process.said(STOP_SAID)]
        return any(why in line["why"] and "seamark topology repair" in line["remedy"] for line in lines)

    await eventually(said, seconds=60)


async def repaired(dispatcher: DispatcherProcess, *positions: str) -> None:
    """What the dispatchers' log told the operator to run, on the same servers."""
    at = [word for position in positions for word in ("--at", position)]
    servers = {"SEAMARK_NATS_URL": dispatcher.nats_url, "SEAMARK_REDIS_URL": dispatcher.redis_url}
    done = await asyncio.to_thread(seamark, "topology", "repair", "--yes", *at, **servers)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stream", ["EVENTS", "LOG-2"])
async def test_under_a_new_epoch_of_a_stream_dispatchers_go_on_by_themselves_and_nothing_is_lost_or_doubled(
    stream: str, broker: Broker, first: DispatcherProcess, second: DispatcherProcess, chaos: Chaos
) -> None:
    async with chaos.under_load(broker, shared=0.4, rate=150) as load:
        await eventually(lambda: load.acknowledged > 150)
        [(before, after)] = (await topology.restore(broker, [stream])).values()
        await eventually(lambda: marked(broker, after), seconds=60)
    await chaos.judge(broker)
    assert not [line for process in (first, second) for line in process.said(STOP_SAID)]
    assert before != after


async def marked(broker: Broker, epoch: str) -> bool:
    """Whether some home mark counts, or lies, in this incarnation."""
    marks = [(await read_mark(broker, EVENTS.marked(p, p))).mark for p in range(PARTITIONS)]
    return any(mark is not None and epoch in (mark.epoch, mark.stream_epoch) for mark in marks)


async def test_a_change_is_noticed_without_any_event_to_dispatch(
    broker: Broker, only: DispatcherProcess, chaos: Chaos
) -> None:
    await chaos.load(broker).run(60)
    await chaos.settled(broker)
    await broker.api("STREAM.DELETE.EVENTS")
    await topology.ensure(broker, "dev", overrides=FAST)
    await eventually(lambda: only.metric(STOPPED) == PARTITIONS, seconds=60)


async def test_recreated_events_stop_every_partition_and_none_of_the_new_ones_is_taken_for_an_old_one(
    broker: Broker, first: DispatcherProcess, second: DispatcherProcess, chaos: Chaos
) -> None:
    await chaos.load(broker, shared=0.4).run(300)
    await chaos.settled(broker)
    await broker.api("STREAM.DELETE.EVENTS")
    await topology.ensure(broker, "dev", overrides=FAST)
    # The new stream outgrows the old one at once, so that the old positions lie inside it.
    async with chaos.under_load(broker, prefix="new", shared=0.4) as load:
        await eventually(lambda: load.acknowledged > 600, seconds=60)
        await eventually(lambda: stopped(first, second) >= PARTITIONS, seconds=60)
    await repair_is_named("EVENTS", first, second)
    first.stop()
    second.stop()
    await repaired(first, "first")
    first.start()
    await chaos.judge(broker)


async def test_a_recreated_log_stops_its_partitions_and_is_filled_again_from_where_the_operator_says(
    broker: Broker, first: DispatcherProcess, second: DispatcherProcess, chaos: Chaos
) -> None:
    # Only personal events: what the lost log held is all in its own partition of EVENTS.
    load = chaos.load(broker, shared=0)
    await load.run(200)
    await chaos.settled(broker)
    await broker.api("STREAM.DELETE.LOG-1")
    await topology.ensure(broker, "dev", overrides=FAST)
    await load.run(200)
    await eventually(lambda: stopped(first, second) >= 1, seconds=60)
    await repair_is_named("LOG-1", first, second)
    first.stop()
    second.stop()
    await repaired(first, "1=first")
    second.start()
    await chaos.load(broker, prefix="later").run(50)
    await chaos.judge(broker)


async def test_a_log_put_back_to_an_older_backup_behind_a_dispatchers_back_is_filled_again_as_soon_as_it_is_said(
    broker: Broker, only: DispatcherProcess, chaos: Chaos
) -> None:
    """The dispatcher finds marks of its own that are older than those it has confirmed."""
    load = chaos.load(broker, shared=0)
    await load.run(200)
    await chaos.settled(broker)
    state = await broker.stream("LOG-1")
    await load.run(100)
    await chaos.settled(broker)
    for seq in range((await broker.stream("LOG-1")).last_seq, state.last_seq, -1):
        await broker.api("STREAM.MSG.DELETE.LOG-1", {"seq": seq})
    await load.run(50)
    await topology.restore(broker, ["LOG-1"])
    await chaos.judge(broker)


async def test_what_is_no_mark_on_a_marks_subject_stops_the_partition_and_names_the_message_to_delete(
    broker: Broker, only: DispatcherProcess, chaos: Chaos
) -> None:
    load = chaos.load(broker, shared=0.4)
    await load.run(100)
    await chaos.settled(broker)
    ack = await broker.append("mark.3.3", b"oops")
    await load.run(100)
    await eventually(lambda: only.metric(STOPPED) == 1)
    [said] = only.said(STOP_SAID)
    assert said["remedy"] == f"Delete message {ack.seq} of LOG-3: the mark before it counts then"
    await broker.api("STREAM.MSG.DELETE.LOG-3", {"seq": ack.seq})
    await chaos.judge(broker)
    await eventually(lambda: only.metric(STOPPED) == 0)
