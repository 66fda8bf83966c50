"""`send_at`: an event waits in LATER, and is a record once and when it is due, whatever happens meanwhile."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from chaos.load import drained
from engine import metrics
from engine.broker import wire
from engine.broker.jetstream import Broker
from engine.cancels import cancel
from engine.dispatch.absence import SEEN_KEY, Absence
from engine.dispatch.source import BULK, EVENTS, LATER, LATER_PLACE
from engine.errors import BrokerError
from engine.log.writer import read_mark
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from seamark import Publisher
from seamark.protocol.subjects import partition_of
from tests.support.backups import put_back, take
from tests.support.gateways import gateway_on
from tests.support.logs import (
    FAST,
    Entry,
    all_records,
    connected,
    dispatching,
    eventually,
    mark_water,
    publish,
    redis_at,
)
from tests.support.roles import dispatcher_processes

PARTITIONS = 4
USERS = [f"user{number}" for number in range(8)]
HOME = partition_of("default", "alice", PARTITIONS)


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


def ahead(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def records(broker: Broker, number: int, *, seconds: float = 30) -> list[Entry]:
    """All records, once there are so many."""

    async def there() -> list[Entry] | None:
        try:
            found = await all_records(broker, PARTITIONS)
        except BrokerError:  # it was killed a moment ago
            return None
        return found if len(found) >= number else None

    found = await eventually(there, seconds=seconds)
    assert isinstance(found, list)
    return found


async def waits(broker: Broker, number: int) -> bool:
    """Whether so many events wait in LATER, or have."""
    answer = await broker.api("STREAM.INFO.LATER", {"subjects_filter": "wait.>"})
    return sum((answer["state"].get("subjects") or {}).values()) >= number


async def test_an_event_is_a_record_when_it_is_due_and_says_where_it_was_published(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with Publisher(nats_url=nats_server.url) as publisher, dispatching(nats_server.url, valkey.url):
        due = ahead(4)
        later = await publisher.publish(to=["alice", "bob"], type="demo.later", id="later", send_at=due)
        low = await publisher.publish(to=["alice"], type="demo.low", id="low", send_at=due, priority="low")
        await publisher.publish(to=["alice"], type="demo.now", id="now", send_at=ahead(-60))
        found = await records(broker, 4)
    assert Counter(each.id for each in found) == {"now": 1, "later": 2, "low": 1}
    by_id = {each.id: each for each in found}
    for id, source, ack in (("later", EVENTS, later), ("low", BULK, low)):
        assert by_id[id].record["event"] == {"epoch": (await broker.stream(source.stream)).epoch, "seq": ack.seq}
        assert due <= datetime.fromisoformat(by_id[id].record["at"]) < due + timedelta(seconds=0.1)
        # The clocks of broker and dispatcher are one here.
        assert datetime.fromisoformat(by_id[id].stored.time) >= due


async def test_what_is_to_be_sent_in_two_seconds_is_on_the_device_within_a_third_of_a_second_after_them(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    """Never before. How soon after it is up to the machine, too: one of a few is enough."""
    async with (
        dispatching(nats_server.url, valkey.url),
        gateway_on(nats_server, topology_ready=True, redis_url=valkey.url) as gateway,
        gateway.device("alice") as device,
    ):
        await device.until("live")
        for number in range(12):
            due = ahead(2)
            await publish(broker, to=["alice"], type="demo.later", id=f"e{number}", send_at=due)
            await device.until("record", timeout=30)
            seconds = (datetime.now(UTC) - due).total_seconds()
            assert seconds >= 0
            if seconds < 0.3:
                break
        else:
            pytest.fail("none was on time")


async def test_what_is_due_at_once_shares_schedules_and_marks_leave_nothing_behind(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    due = ahead(600)
    async with dispatching(nats_server.url, valkey.url):
        for number in range(60):
            await publish(broker, to=["alice"], type="demo.later", id=f"e{number}", send_at=due)
        await eventually(lambda: waits(broker, 60))
        answer = await broker.api("STREAM.INFO.LATER", {"subjects_filter": ">"})
        kept = Counter({subject.split(".")[0]: 0 for subject in answer["state"]["subjects"]})
        for subject, number in answer["state"]["subjects"].items():
            kept[subject.split(".")[0]] += number
    assert (kept["wait"], kept["later"], kept["mark"]) == (60, 1, 1)


async def test_an_id_that_is_published_again_while_its_event_waits_or_later_adds_nothing(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with dispatching(nats_server.url, valkey.url):
        due = ahead(1.5)
        for _ in range(2):
            await publish(broker, to=["alice"], type="demo", id="e1", send_at=due, deduplicated=False)
        await publish(broker, to=["alice"], type="demo", id="e1", deduplicated=False)
        await records(broker, 1)
        for send_at in (None, ahead(0.5)):
            await publish(broker, to=["alice"], type="demo", id="e1", send_at=send_at, deduplicated=False)
        await publish(broker, to=["alice"], type="demo", id="last", send_at=ahead(1))
        found = await records(broker, 2)
    assert [each.id for each in found] == ["e1", "last"]


async def test_what_is_cancelled_or_over_by_the_time_it_is_due_is_shown_to_nobody(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with dispatching(nats_server.url, valkey.url, sources=(EVENTS, BULK)):
        due = ahead(4)
        await publish(broker, to=["alice"], type="demo", id="cancelled", send_at=due, transaction_id="order 17")
        await publish(broker, to=["alice"], type="demo", id="over", send_at=due, expires_at=due - timedelta(seconds=1))
        await publish(broker, to=["alice"], type="demo", id="shown", send_at=due, transaction_id="order 18")
        await eventually(lambda: waits(broker, 3))
    # However late it is by now: nobody dispatches what is due meanwhile.
    await cancel(broker, "default", "order 17", budget_seconds=30)
    async with dispatching(nats_server.url, valkey.url):
        found = {each.id: each for each in await records(broker, 3)}
    why = {id: each.record["plan"]["inapp"] for id, each in found.items()}
    assert why["cancelled"] == {"when": "never", "why": "cancelled"}
    assert why["over"] == {"when": "never", "why": "expired"}
    assert why["shown"]["when"] == "now"
    assert {id for id, each in found.items() if wire.header(each.stored.headers, b"Seamark-Skip")} == {
        "cancelled",
        "over",
    }


async def test_where_later_is_full_an_event_that_is_not_due_becomes_a_dead_letter_and_others_go_on(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with dispatching(nats_server.url, valkey.url):
        await publish(broker, to=["alice"], type="demo", id="fits", send_at=ahead(2))
        await eventually(lambda: drained(broker, PARTITIONS))
        await mark_water(broker, 1)
        await publish(broker, to=["alice"], type="demo", id="does-not", send_at=ahead(3600))
        await publish(broker, to=["alice"], type="demo", id="now")
        found = await records(broker, 2)
    assert {each.id for each in found} == {"fits", "now"}
    letter = await broker.leader_next("DEAD-LETTERS", ">", 1)
    assert letter is not None
    assert wire.header(letter.headers, b"Seamark-Reason") == b"later_full"
    assert b"does-not" in letter.payload


async def test_a_tenant_that_has_put_off_more_than_is_free_puts_off_no_more_and_others_do(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with dispatching(nats_server.url, valkey.url):
        for number in range(20):  # a few large ones beside many small ones: what counts is bytes
            data = {"text": "x" * 50_000} if number == 0 else {}
            tenant = "greedy" if number == 0 else "modest"
            await publish(
                broker, to=["alice"], tenant=tenant, type="demo", id=f"e{number}", send_at=ahead(3600), data=data
            )
        await eventually(lambda: waits(broker, 20))
        await mark_water(broker, int((await broker.stream("LATER")).bytes * 1.5))
        for tenant in ("greedy", "modest"):
            await publish(broker, to=["alice"], tenant=tenant, type="demo", id="one-more", send_at=ahead(3600))
        await eventually(lambda: drained(broker, PARTITIONS))
        await eventually(lambda: waits(broker, 21))
    assert await broker.count("LATER", "wait.*.*.greedy") == (1, 1)
    letter = await broker.leader_next("DEAD-LETTERS", ">", 1)
    assert letter is not None
    assert wire.header(letter.headers, b"Seamark-Reason") == b"later_full"
    assert b"its tenant has" in (wire.header(letter.headers, b"Seamark-Detail") or b"")
    assert (await broker.stream("DEAD-LETTERS")).messages == 1


async def test_an_id_that_is_published_again_and_again_takes_its_tenants_share_once(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    again: dict[str, Any] = {"to": ["alice"], "tenant": "again", "type": "demo", "data": {"text": "x" * 50_000}}
    async with dispatching(nats_server.url, valkey.url):
        for _ in range(10):
            await publish(broker, **again, id="same", send_at=ahead(3600), deduplicated=False)
        await eventually(lambda: drained(broker, PARTITIONS))
        await mark_water(broker, int((await broker.stream("LATER")).bytes * 2.5))
        await publish(broker, **again, id="other", send_at=ahead(3600))
        await eventually(lambda: drained(broker, PARTITIONS))
    assert (await broker.count("LATER", "wait.*.*.again"))[0] == 2
    assert (await broker.stream("DEAD-LETTERS")).messages == 0


@pytest.mark.parametrize(("days", "alarms"), [(None, 0), (1, 0), (6, 0), (7, 1)])
async def test_where_nobody_dispatched_for_as_long_as_later_keeps_what_is_due_the_first_who_does_says_so(
    broker: Broker, valkey: Valkey, days: int | None, alarms: int
) -> None:
    before = metrics.dispatchers_absent._value.get()
    async with redis_at(valkey.url) as redis:
        await (redis.delete(SEEN_KEY) if days is None else redis.set(SEEN_KEY, int(time.time()) - days * 86_400))
        for _ in range(2):
            await Absence(broker, redis).look()
    assert metrics.dispatchers_absent._value.get() - before == alarms


@pytest.mark.timeout(300)
async def test_broker_and_dispatchers_killed_meanwhile_everything_is_sent_once(
    broker: Broker, nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    ids = [f"e{number}" for number in range(200)]
    with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
        first.start()
        due = ahead(5)
        await asyncio.gather(
            *(publish(broker, to=USERS[n % 8 : n % 8 + 2], type="demo", id=id, send_at=due) for n, id in enumerate(ids))
        )
        first.kill()  # some are put off by now
        second.start()
        await eventually(lambda: drained(broker, PARTITIONS), seconds=60)
        await asyncio.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()))
        nats_server.kill()
        second.kill()
        nats_server.start()
        first.start()
        second.start()
        expected = {(id, user) for n, id in enumerate(ids) for user in USERS[n % 8 : n % 8 + 2]}
        await records(broker, len(expected) // 4, seconds=90)
        first.kill()
        nats_server.kill()
        nats_server.start()
        found = await records(broker, len(expected), seconds=90)
    assert Counter((each.id, each.user) for each in found) == Counter(dict.fromkeys(expected, 1))


async def test_what_was_sent_after_a_backup_of_later_is_not_sent_again_when_that_is_put_back(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url):
            due = ahead(10)  # enough to take the backup before
            for number, user in enumerate(USERS):
                await publish(broker, to=[user], type="demo", id=f"e{number}", send_at=due)
            await eventually(lambda: drained(broker, PARTITIONS))
        end = (await broker.stream("LATER")).last_seq
    take(nats_server, "LATER", tmp_path / "backup")
    async with connected(nats_server.url) as broker, dispatching(nats_server.url, valkey.url):
        await records(broker, len(USERS))
    put_back(nats_server, "LATER", tmp_path / "backup")
    async with connected(nats_server.url) as broker:
        await topology.restore(broker, ["LATER"], {"LATER": end})
        async with dispatching(nats_server.url, valkey.url):
            await publish(broker, to=USERS, type="demo", id="after", key="room", send_at=ahead(1))
            await records(broker, 2 * len(USERS))
            await eventually(lambda: all_fired(broker, end))
            found = await all_records(broker, PARTITIONS)
    expected = {(f"e{n}", user) for n, user in enumerate(USERS)} | {("after", user) for user in USERS}
    assert Counter((each.id, each.user) for each in found) == Counter(dict.fromkeys(expected, 1))


async def all_fired(broker: Broker, end: int) -> bool:
    """Whether no schedule is left in LATER, and every wake-up is dispatched."""
    answer: dict[str, Any] = await broker.api("STREAM.INFO.LATER", {"subjects_filter": "later.>"})
    if answer["state"].get("subjects"):
        return False
    for q in range(PARTITIONS):
        mark = (await read_mark(broker, LATER.marked(q, q))).mark
        last = await broker.leader_last("LATER", f"due.{q}.*")
        if last is not None and last.seq > end and (mark is None or mark.seq < last.seq):
            return False
    return True


async def test_a_take_over_in_the_middle_reads_its_place_from_marks_in_later_and_in_the_logs(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    due = ahead(5)
    for turn in range(3):
        async with dispatching(nats_server.url, valkey.url):
            for number in range(5):
                await publish(broker, to=["alice"], type="demo", id=f"e{turn}-{number}", send_at=due)
            await eventually(lambda: drained(broker, PARTITIONS))
    valkey.kill()  # without claims marks alone know what was put off and what was sent
    placed = await read_mark(broker, EVENTS.marked(LATER_PLACE, HOME))
    assert placed.mark is not None
    async with dispatching(nats_server.url, valkey.url):
        found = await records(broker, 15)
        await eventually(lambda: all_fired(broker, 0))
    async with dispatching(nats_server.url, valkey.url):
        await publish(broker, to=["alice"], type="demo", id="last")
        found = await records(broker, 16)
    assert Counter(each.id for each in found) == Counter(
        [f"e{turn}-{number}" for turn in range(3) for number in range(5)] + ["last"]
    )
    assert time.time() >= due.timestamp()
