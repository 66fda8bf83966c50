"""BULK beside EVENTS: the same dispatcher, the same promises, and EVENTS goes first."""

import json
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from engine.broker.jetstream import Broker
from engine.dispatch.source import BULK, EVENTS, SOURCES
from engine.log.writer import read_mark
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from seamark import Publisher
from seamark.protocol.subjects import bulk_subject, encode_token, log_stream, partition_of, stored_event
from tests.support.logs import FAST, all_records, connected, dispatching, eventually, publish
from tests.support.overlays import QUICK_DISK

pytestmark = pytest.mark.overlay(QUICK_DISK)

PARTITIONS = 4
PAGES, PAGE_USERS = 12, 1000


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


async def has_records(broker: Broker, number: int) -> bool:
    return len(await all_records(broker, PARTITIONS)) >= number


async def left(broker: Broker) -> int:
    """How many events of BULK are not dispatched yet."""
    waiting = 0
    for q in range(PARTITIONS):
        mark = (await read_mark(broker, BULK.marked(q, q))).mark
        last = await broker.leader_last(BULK.stream, f"bk.{q}.>")
        waiting += last is not None and (mark is None or mark.next_seq <= last.seq)
    return waiting


async def test_an_event_of_low_priority_waits_in_bulk_and_becomes_a_record_that_says_where_it_was(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with Publisher(nats_url=nats_server.url) as publisher, dispatching(nats_server.url, valkey.url):
        low = await publisher.publish(to=["alice"], type="demo.low", id="low", priority="low")
        await publisher.publish(to=["alice"], type="demo.normal", id="normal")
        await eventually(lambda: has_records(broker, 2))
        records = {each.id: each.record for each in await all_records(broker, PARTITIONS)}
    stored = await broker.leader_next("BULK", ">", low.seq or 0)
    assert stored is not None
    q = partition_of("default", "alice", PARTITIONS)
    assert (
        stored.subject
        == f"bk.{q}.default.alice.demo.low"
        == stored_event(bulk_subject("default", "alice", "demo.low"), q)
    )
    epochs = {source.stream: (await broker.stream(source.stream)).epoch for source in SOURCES}
    assert records["low"]["event"] == {"epoch": epochs["BULK"], "seq": low.seq}
    assert records["normal"]["event"]["epoch"] == epochs["EVENTS"]


async def test_an_event_published_to_both_streams_is_appended_once(
    patient: None, broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with dispatching(nats_server.url, valkey.url):
        await publish(broker, to=["alice"], type="demo.hello", id="e1", priority="low")
        await eventually(lambda: has_records(broker, 1))
        await publish(broker, to=["alice"], type="demo.hello", id="e1")
        await publish(broker, to=["alice"], type="demo.hello", id="e2")
        await eventually(lambda: has_records(broker, 2))
        assert [each.id for each in await all_records(broker, PARTITIONS)] == ["e1", "e2"]


async def test_the_next_dispatcher_goes_on_where_the_last_one_was_in_each_source(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    users = [f"user{number}" for number in range(20)]
    for turn in range(3):
        async with dispatching(nats_server.url, valkey.url):
            for priority in ("low", "normal"):
                await publish(broker, to=users, type="demo.hello", id=f"{priority}{turn}", priority=priority)
            await eventually(lambda: has_records(broker, 2 * len(users) * (turn + 1)))  # noqa: B023
    valkey.kill()  # without claims marks alone know what was dispatched
    async with dispatching(nats_server.url, valkey.url):
        await publish(broker, to=["last"], type="demo.hello", id="last")
        await eventually(lambda: has_records(broker, 6 * len(users) + 1))
    found = [(each.user, each.id) for each in await all_records(broker, PARTITIONS)]
    assert len(found) == len(set(found)) == 6 * len(users) + 1


async def test_what_is_no_event_in_bulk_becomes_a_dead_letter_of_its_own(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with dispatching(nats_server.url, valkey.url):
        for subject in ("bulk.default.alice.demo.hello", "events.default.alice.demo.hello"):
            await broker.append(subject, b'{"id":"e1","to":[]}')

        async def both() -> bool:
            return (await broker.stream("DEAD-LETTERS")).messages == 2

        await eventually(both)
    letters = [await broker.leader_next("DEAD-LETTERS", ">", seq) for seq in (1, 2)]
    subjects = {json.dumps(letter.headers.decode()) for letter in letters if letter}
    assert any("bk." in each for each in subjects)
    assert any("ev." in each for each in subjects)


async def test_a_backlog_of_bulk_keeps_no_event_waiting(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    """Each urgent event is in its log while some of the backlog is still to come."""
    for page in range(PAGES):
        users = [f"user{number}" for number in range(page * PAGE_USERS, (page + 1) * PAGE_USERS)]
        await publish(broker, to=users, type="demo.page", id=f"page{page}", priority="low", key=f"page{page}")
    p = partition_of("default", encode_token("alice"), PARTITIONS)

    async def records() -> int:
        return sum([(await broker.stream(log_stream(each))).messages for each in range(PARTITIONS)])

    async with dispatching(nats_server.url, valkey.url):
        await eventually(records, every_seconds=0.005)
        for number in range(5):
            ack = await publish(broker, to=["alice"], type="demo.hello", id=f"e{number}")

            async def dispatched(seq: int = ack.seq) -> bool:
                mark = (await read_mark(broker, EVENTS.marked(p, p))).mark
                return mark is not None and mark.next_seq > seq

            await eventually(dispatched, every_seconds=0.002)
        assert await left(broker) > 0, "the backlog was dispatched before the events that came after it"

        async def done() -> bool:
            return await left(broker) == 0

        await eventually(done)
    found = Counter((each.user, each.id) for each in await all_records(broker, PARTITIONS))
    due = [(f"user{number}", f"page{number // PAGE_USERS}") for number in range(PAGES * PAGE_USERS)]
    assert found - Counter(due) == Counter(("alice", f"e{number}") for number in range(5))
    assert Counter(due) - found == Counter()
