"""Dead letters without room: what is left is buried later, whatever happens in between, and nothing else is."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from chaos.load import whole_stream
from engine import metrics
from engine.broker import wire
from engine.broker.jetstream import Broker, Page, StreamState
from engine.dispatch import burials as burying
from engine.dispatch.burials import Burials, store_letter
from engine.dispatch.rounds import Dead, plan
from engine.dispatch.source import EVENTS
from engine.errors import ApiError, Unanswered
from engine.limits import PIN_TIMEOUT_SECONDS
from engine.log.marks import Mark
from engine.log.writer import read_mark
from engine.partition import reader as reading
from engine.partition.reader import Phase
from engine.partition.worker import delivered
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.subjects import partition_of
from tests.support.logs import FAST, all_records, connected, dispatching, eventually, mark_water, publish
from tests.support.overlays import QUICK_DISK

pytestmark = pytest.mark.overlay(QUICK_DISK)

Q = partition_of("default", "user1", 4)


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


async def dead_events(broker: Broker, count: int) -> list[Dead]:
    for number in range(count):
        await broker.append("events.default.user1.demo.bad", b"{no json %d" % number)
    outcomes = [plan(delivered(stored), "e") for stored in await whole_stream(broker, "EVENTS", f"ev.{Q}.>")]
    assert all(isinstance(outcome, Dead) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, Dead)]


async def room(broker: Broker, *, on: bool) -> None:
    config = (await broker.stream("DEAD-LETTERS")).config
    await broker.api("STREAM.UPDATE.DEAD-LETTERS", config | {"max_bytes": 1 << 20 if on else 1})


async def letters(broker: Broker) -> list[bytes]:
    return [stored.payload for stored in await whole_stream(broker, "DEAD-LETTERS", "dlq.>")]


async def test_what_was_left_is_buried_when_there_is_room_and_what_was_not_dispatched_yet_is_not(
    broker: Broker,
) -> None:
    one, two, three, four = await dead_events(broker, 4)
    burials = Burials(broker, Q, EVENTS)
    burials.take_over("e", None)
    await room(broker, on=False)
    for dead in (one, two):
        await burials.bury(dead)
    assert burials.first == one.delivered.seq
    with pytest.raises(ApiError):
        await burials._bury_left()
    assert burials.first == one.delivered.seq
    await room(broker, on=True)
    await burials.bury(three)  # in order: it waits for those before it
    assert await letters(broker) == []
    await burials._bury_left()
    assert burials.first is None
    assert await letters(broker) == [dead.delivered.payload for dead in (one, two, three)]
    await burials.bury(four)
    assert len(await letters(broker)) == 4


async def test_whoever_takes_over_buries_what_the_mark_says_is_missing_and_stores_no_letter_twice(
    broker: Broker,
) -> None:
    first, *_, last = await dead_events(broker, 300)  # more than a page
    earlier = Burials(broker, Q, EVENTS)
    earlier.take_over("e", None)
    await earlier.bury(first)
    await broker.append("events.default.user1.demo.bad", b"{not dispatched yet")
    burials = Burials(broker, Q, EVENTS)
    mark = Mark("e", last.delivered.seq, 1, "o", "l", unburied=first.delivered.seq)
    burials.take_over("e", mark)
    await burials._bury_left()
    assert burials.first is None
    assert await letters(broker) == [b"{no json %d" % number for number in range(300)]


async def test_events_that_age_took_before_they_were_buried_end_no_burial(broker: Broker) -> None:
    *_, last = await dead_events(broker, 3)
    burials = Burials(broker, Q, EVENTS)
    burials.take_over("e", Mark("e", last.delivered.seq, 1, "o", "l", unburied=1))
    await broker.api("STREAM.PURGE.EVENTS", {"seq": last.delivered.seq})
    await burials._bury_left()
    assert burials.first is None
    assert await letters(broker) == [last.delivered.payload]


async def test_whoever_waits_for_dead_letters_without_a_leader_does_not_lose_its_partition_meanwhile(
    broker: Broker,
) -> None:
    one, two = await dead_events(broker, 2)
    await broker.api("STREAM.DELETE.DEAD-LETTERS")  # nobody answers there, as without a leader
    for _ in range(3):  # a machine that stands still for a while does not each time
        burials, began = Burials(broker, Q, EVENTS), time.monotonic()
        burials.take_over("e", None)
        for dead in (one, two):
            await burials.bury(dead)
        if (took := time.monotonic() - began) < PIN_TIMEOUT_SECONDS:
            break
    assert took < PIN_TIMEOUT_SECONDS
    assert burials.first == one.delivered.seq


async def test_a_leader_that_does_not_show_yet_what_was_dispatched_is_not_believed_that_nothing_is_left(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = await dead_events(broker, 2)
    burials = Burials(broker, Q, EVENTS)
    burials.take_over("e", Mark("e", last.delivered.seq, 1, "o", "l", unburied=first.delivered.seq))
    stream = broker.stream

    async def nothing(*args: Any, **options: Any) -> Any:
        return Page([], more=False)

    async def no_message(*args: Any, **options: Any) -> None:
        return None

    async def behind(name: str, **options: Any) -> StreamState:
        return replace(await stream(name, **options), last_seq=first.delivered.seq)

    with monkeypatch.context() as lagging:
        lagging.setattr(broker, "next_by_subject", nothing)
        lagging.setattr(broker, "leader_next", no_message)
        lagging.setattr(broker, "stream", behind)
        for _ in range(3):
            with pytest.raises(Unanswered):
                await burials._bury_left()
    assert burials.first == first.delivered.seq
    await burials._bury_left()
    assert burials.first is None
    assert len(await letters(broker)) == 2


async def test_once_all_letters_are_stored_the_mark_says_so_although_nothing_comes_and_no_alarm_follows_when_age_trims(
    broker: Broker, nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burying, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(reading, "KEEP_POSITION_SECONDS", 0.2)

    async def unburied() -> int | None:
        mark = (await read_mark(broker, EVENTS.marked(Q, Q))).mark
        return mark.unburied if mark else None

    async with dispatching(nats_server.url, valkey.url):
        await room(broker, on=False)
        await broker.append("events.default.user1.demo.bad", b"{no json")
        await eventually(unburied)
        await room(broker, on=True)

        async def cleared() -> bool:
            return await unburied() is None

        await eventually(cleared)
    assert len(await letters(broker)) == 1
    await broker.api("STREAM.PURGE.EVENTS")
    before = metrics.dead_letters_trimmed._value.get()
    async with dispatching(nats_server.url, valkey.url) as working:
        await publish(broker, to=["user1"], type="demo.good", id="good")
        await eventually(lambda: working.readers[Q].phase is Phase.READING)
        assert working._workers[Q].burials.first is None
        await working._workers[Q].burials._bury_left()
    assert metrics.dead_letters_trimmed._value.get() == before


async def test_messages_of_others_that_age_has_trimmed_are_no_dead_letters_lost(broker: Broker) -> None:
    one, two = await dead_events(broker, 2)
    burials = Burials(broker, Q, EVENTS)
    burials.take_over("e", Mark("e", two.delivered.seq, 1, "o", "l", unburied=one.delivered.seq))
    for number in range(3):
        await broker.append("events.default.user1.demo.bad", b"{no json %d" % number)
    await store_letter(broker, one, Q, "e")
    await room(broker, on=False)
    with pytest.raises(ApiError):
        await burials._bury_left()
    assert burials.first == two.delivered.seq, "the letter of the first is there already"


async def test_without_room_for_what_is_not_due_nor_for_its_letter_the_partition_goes_on_and_the_letters_follow(
    broker: Broker, nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burying, "RETRY_SECONDS", 0.1)
    send_at = datetime.now(UTC) + timedelta(hours=1)

    async def later(number: int, shown: str) -> None:
        """An event that is not due, and one behind it that is dispatched."""
        await publish(broker, to=["user1"], type="demo.later", id=f"later{number}", send_at=send_at)
        await publish(broker, to=["user1"], type="demo.now", id=shown)
        await eventually(lambda: recorded(broker, shown))

    async def put_off() -> int:
        return (await broker.count("LATER", "wait.>"))[0]

    async with dispatching(nats_server.url, valkey.url):
        await later(0, "one")
        assert await put_off() == 1
        await room(broker, on=False)
        await mark_water(broker, 1)
        await later(1, "two")
    await mark_water(broker, 1 << 30)
    async with dispatching(nats_server.url, valkey.url) as working:  # whoever takes over knows it from the mark
        await later(2, "three")
        assert await put_off() == 1, "found again without its letter, it would look like one that was put off"
        assert await letters(broker) == []
        await room(broker, on=True)

        async def buried() -> bool:
            return len(await letters(broker)) == 2

        await eventually(buried)
        await eventually(lambda: working._workers[Q].burials.refused is None)
        stored = await whole_stream(broker, "DEAD-LETTERS", "dlq.>")
        assert [json.loads(one.payload)["id"] for one in stored] == ["later1", "later2"]
        assert {wire.header(one.headers, b"Seamark-Reason") for one in stored} == {b"later_full"}
        await later(3, "four")
        assert await put_off() == 2


async def recorded(broker: Broker, id: str) -> bool:
    """Whether a log has this notification."""
    return any(entry.id == id for entry in await all_records(broker, 4))
