"""A stream without room refuses or stalls, says so, and goes on when there is room; nothing is dropped."""

import asyncio

import pytest

from chaos.load import drained, whole_stream
from engine.broker.jetstream import Broker
from engine.errors import ApiError
from tests.support.chaos import PARTITIONS, Chaos
from tests.support.logs import eventually, publish
from tests.support.roles import DispatcherProcess

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


async def resize(broker: Broker, stream: str, max_bytes: int) -> None:
    config = (await broker.stream(stream)).config
    await broker.api(f"STREAM.UPDATE.{stream}", {**config, "max_bytes": max_bytes})


async def bytes_of(broker: Broker, stream: str) -> int:
    return int((await broker.api(f"STREAM.INFO.{stream}"))["state"]["bytes"])


async def test_a_full_log_stalls_its_partition_with_an_alarm_and_goes_on_when_there_is_room(
    broker: Broker, first: DispatcherProcess, second: DispatcherProcess, chaos: Chaos
) -> None:
    load = chaos.load(broker, shared=0.1, rate=200)
    await load.run(100)
    await chaos.settled(broker)
    before = await broker.stream("LOG-2")
    await resize(broker, "LOG-2", 1024 * 24)
    running = asyncio.create_task(load.run(600), name="load")

    def alarmed() -> bool:
        stalled = "seamark_dispatcher_append_stalled"
        return any(p.metric(stalled, stream="LOG-2") >= 1 for p in (first, second) if p.alive)

    def said_why() -> bool:
        lines = [*first.said("partition_waits"), *second.said("partition_waits")]
        return any("maximum bytes exceeded" in line["why"] for line in lines)

    await eventually(alarmed, seconds=60)
    await eventually(said_why)
    await running
    assert (await broker.stream("LOG-2")).first_seq == before.first_seq  # nothing was dropped to make room
    assert not await drained(broker, PARTITIONS)
    first.stop()
    assert first.exit_code == 0  # an orderly end does not wait for room: who must be cut off says so
    await resize(broker, "LOG-2", 1 << 30)
    await chaos.judge(broker)
    await eventually(lambda: second.metric("seamark_dispatcher_append_stalled", stream="LOG-2") == 0)


async def test_full_events_refuse_with_a_clear_error_and_go_on_when_there_is_room(
    broker: Broker, only: DispatcherProcess, chaos: Chaos
) -> None:
    load = chaos.load(broker)
    await load.run(100)
    await resize(broker, "EVENTS", await bytes_of(broker, "EVENTS") + 1024 * 8)
    full = chaos.load(broker, prefix="full")
    await full.run(300)
    assert 0 < full.acknowledged < 300
    with pytest.raises(ApiError, match="maximum bytes exceeded"):
        await publish(broker, to=["user1"], type="chaos.n", id="x", data={"fill": "x" * 1024})
    assert (await broker.stream("EVENTS")).first_seq == 1
    await resize(broker, "EVENTS", 1 << 30)
    await load.run(100)
    await chaos.judge(broker)


async def test_full_dead_letters_hold_no_event_up_and_are_completed_when_there_is_room_whoever_dispatches_then(
    broker: Broker, first: DispatcherProcess, second: DispatcherProcess, chaos: Chaos
) -> None:
    await resize(broker, "DEAD-LETTERS", 2048)
    load = chaos.load(broker)
    for round_ in range(2):
        for number in range(10):
            await broker.append("events.default.user1.demo.bad", b"{no json %d %d" % (round_, number))
            await load.run(5)

    def alarmed(*processes: DispatcherProcess) -> bool:
        stalled = "seamark_dispatcher_append_stalled"
        return any(process.metric(stalled, stream="DEAD-LETTERS") >= 1 for process in processes)

    await eventually(lambda: alarmed(first, second), seconds=60)
    await chaos.settled(broker)  # what can be delivered is, though the alarm stands
    assert 0 < (await broker.stream("DEAD-LETTERS")).messages < 20
    await eventually(lambda: first.said("dead_letters_not_stored") or second.said("dead_letters_not_stored"))
    first.kill()
    await load.run(20)
    await eventually(lambda: alarmed(second), seconds=60)
    await resize(broker, "DEAD-LETTERS", 1 << 20)

    async def complete() -> bool:
        return (await broker.stream("DEAD-LETTERS")).messages == 20

    await eventually(complete, seconds=60)
    await eventually(lambda: second.metric("seamark_dispatcher_append_stalled", stream="DEAD-LETTERS") == 0)
    await chaos.judge(broker)
    bodies = {stored.payload for stored in await whole_stream(broker, "DEAD-LETTERS", "dlq.>")}
    assert bodies == {b"{no json %d %d" % (round_, number) for round_ in range(2) for number in range(10)}
