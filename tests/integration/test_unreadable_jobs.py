"""Messages of JOBS that a worker cannot read, on a real broker: newer workers get them, jobs go on, and none is lost."""

import asyncio
from collections import Counter

import msgspec
import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.channels.channel import Job
from engine.errors import ApiError, Unavailable
from engine.jobs import queue
from engine.jobs.claims import Done
from engine.jobs.life import DELIVERIES_MAX
from engine.jobs.messages import job_consumer
from engine.jobs.queue import ACK_WAIT_SECONDS, PulledUnreadable, deliveries_of
from engine.jobs.unreadable import LETTERS_AT_A_TIME, UNDER_WAY_MAX, UnreadableMessages
from engine.jobs.worker import AHEAD
from engine.letters.reading import Filter, letters
from tests.integration.test_worker import Desk, Journal, add, all_done, at_work, broker, ends, jobs, redis
from tests.support.logs import eventually

__all__ = ["broker", "redis"]


async def with_places(broker: Broker, places: int) -> None:
    """Let the lane hand out so many jobs of which it has heard no more, each for as long as the shipped files say."""
    config = (await broker.api(f"CONSUMER.INFO.JOBS.{job_consumer('push', 'normal')}"))["config"]
    config |= {"max_ack_pending": places, "ack_wait": int(ACK_WAIT_SECONDS * 1e9)}
    await broker.api(f"CONSUMER.CREATE.JOBS.{config['name']}", {"stream_name": "JOBS", "config": config})


async def test_messages_that_no_worker_can_read_become_dead_letters_and_keep_nobody_waiting(
    broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the broker hands out unacknowledged would keep the jobs of everybody waiting, for ever."""
    monkeypatch.setattr("engine.jobs.unreadable.PUT_BACK_SECONDS", (0.5, 0.5, 0.5))
    await with_places(broker, 4)
    unreadable = [b'{"id":"newer%d","type":"a.b","first_at":17}' % number for number in range(6)]
    for number, payload in enumerate([*unreadable, b"no json"]):
        await broker.append(f"job.push.normal.default.u{number % 2}", payload)
    await add(broker, jobs(3))
    desk, journal = Desk(), Journal(broker)
    async with at_work(broker, redis, desk, journal):
        await eventually(lambda: all_done(broker), seconds=ACK_WAIT_SECONDS / 2)
    assert set(desk.accepted) == {"n0", "n1", "n2"}
    found = [one async for one in letters(broker, Filter(kind="job"))]
    assert {one.stored.payload for one in found} == {*unreadable, b"no json"}, "whole, as they were"
    assert {(one.letter.cls, one.letter.code, one.letter.tenant, one.letter.channel) for one in found} == {
        ("poison", "unreadable", "default", "push")
    }
    assert {one.letter.id for one in found} == {"", *(f"newer{number}" for number in range(6))}
    assert {one.letter.user for one in found} == {"u0", "u1"}
    told = await ends(broker)
    assert all(told[f"newer{number}"] == ["failed"] for number in range(6))


class NoLetters(Journal):
    """DEAD-LETTERS has no leader."""

    asked = 0

    async def set_aside(self, job: Job, done: Done, payload: bytes) -> None:
        self.asked += 1
        raise Unavailable("no leader")


class SilentLetters(Journal):
    """DEAD-LETTERS never answers."""

    asked = 0

    async def set_aside(self, job: Job, done: Done, payload: bytes) -> None:
        self.asked += 1
        await asyncio.Event().wait()


async def test_while_no_letter_can_be_stored_messages_that_no_worker_can_read_keep_nobody_waiting(
    broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.jobs.unreadable.PUT_BACK_SECONDS", (1.0,))
    await with_places(broker, 4)
    for number in range(6):
        await broker.append(f"job.push.normal.default.u{number % 2}", b'{"id":"newer%d"}' % number)
    desk, journal = Desk(), NoLetters(broker)
    async with at_work(broker, redis, desk, journal):
        await eventually(lambda: journal.asked >= 6, seconds=20)
        await add(broker, jobs(3))
        await eventually(lambda: set(desk.accepted) == {"n0", "n1", "n2"}, seconds=10)
    async with at_work(broker, redis, desk, Journal(broker)):
        await eventually(lambda: all_done(broker), seconds=10)
    assert {one.letter.id async for one in letters(broker, Filter(kind="job"))} == {f"newer{n}" for n in range(6)}


async def test_however_many_messages_cannot_be_read_a_worker_has_few_of_them_and_room_for_jobs(
    broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.jobs.unreadable.PUT_BACK_SECONDS", (0.2,))
    under_way, deliveries, put = [], set[int](), UnreadableMessages.add

    def add_and_count(messages: UnreadableMessages, pulled: PulledUnreadable) -> None:
        put(messages, pulled)
        under_way.append(len(messages._under_way))
        deliveries.add(deliveries_of(pulled.reply))

    monkeypatch.setattr(UnreadableMessages, "add", add_and_count)
    await with_places(broker, 1000)
    for number in range(300):
        await broker.append("job.push.normal.default.u", b'{"id":"newer%d"}' % number)
    desk, journal = Desk(), SilentLetters(broker)
    async with at_work(broker, redis, desk, journal):
        await eventually(lambda: len(under_way) > 600, seconds=20)
        await add(broker, jobs(3))
        await eventually(lambda: set(desk.accepted) == {"n0", "n1", "n2"}, seconds=10)
    assert journal.asked <= LETTERS_AT_A_TIME
    assert UNDER_WAY_MAX <= max(under_way) < UNDER_WAY_MAX + AHEAD, "one lane has them"
    assert deliveries == {1}, "each was put back at once; more of them would count as crashes do"


@pytest.mark.parametrize("journal", [Journal, NoLetters])
async def test_a_job_that_only_newer_workers_can_read_is_left_to_them_and_sent_once(
    broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch, journal: type[Journal]
) -> None:
    """However many there are, however fast older ones find that out, and whether or not letters can be stored meanwhile."""
    monkeypatch.setattr("engine.jobs.unreadable.PUT_BACK_SECONDS", (1.0,) * (5 if journal is Journal else 1))
    await with_places(broker, 1000)
    await add(broker, jobs(300))
    desk, read, each = Desk(), Counter[bytes](), 3 if journal is Journal else DELIVERIES_MAX + 2

    def not_read(payload: bytes) -> Job:
        read[payload] += 1
        raise msgspec.ValidationError("a member that is not known")

    with monkeypatch.context() as older:
        older.setattr(queue, "decode_job", not_read)
        async with at_work(broker, redis, desk, journal(broker)):
            await eventually(lambda: len(read) == 300 and min(read.values()) >= each, seconds=40)
    assert not desk.accepted
    async with at_work(broker, redis, desk, Journal(broker)):
        await eventually(lambda: all_done(broker), seconds=20)
    assert desk.accepted == {f"n{number}": 1 for number in range(300)}
    assert [one async for one in letters(broker, Filter(kind="job"))] == []


async def test_a_message_that_can_be_neither_read_nor_put_back_becomes_a_dead_letter_at_once(
    broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be handed out for ever, and hold one of the places of its lane."""

    async def too_large(pulled: queue.PulledUnreadable, seconds: float) -> None:
        raise ApiError(400, 10054, "message size exceeds maximum allowed")

    monkeypatch.setattr(queue.PulledUnreadable, "put_back", too_large)
    await broker.append("job.push.normal.default.u", b"no json")
    async with at_work(broker, redis, Desk(), Journal(broker)):
        await eventually(lambda: all_done(broker), seconds=ACK_WAIT_SECONDS / 2)
    [found] = [one async for one in letters(broker, Filter(kind="job"))]
    assert (found.stored.payload, found.letter.code) == (b"no json", "unreadable")
