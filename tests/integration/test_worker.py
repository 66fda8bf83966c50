"""A worker on a real broker and a real Valkey: jobs are pulled, tried, tried again, handed back and never left behind."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
import pytest
from redis.asyncio import Redis

from chaos.load import whole_stream
from engine.broker.client import outgoing
from engine.broker.jetstream import Broker
from engine.channels.channel import Job, Outcome
from engine.jobs.claims import Done
from engine.jobs.desk import Hold, Over, Send, Split
from engine.jobs.handling import Handler
from engine.jobs.life import DELIVERIES_MAX
from engine.jobs.messages import job_consumer, message_of
from engine.jobs.queue import ACK_WAIT_SECONDS, JobsQueue
from engine.jobs.redisclaims import RedisClaims
from engine.jobs.retry import RetryPolicy
from engine.jobs.worker import AT_A_TIME, Worker
from engine.letters.reading import Filter, letters
from engine.letters.writing import store_job_letter
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.receipts import Receipt, decode_receipt
from seamark.protocol.subjects import receipt_subject
from tests.support.logs import FAST, connected, eventually

POLICY = RetryPolicy((0.05, 0.1, 0.1), (0, 1), 60)


def sooner(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """As FAST, and jobs of a worker that has died are handed out again within a second or two."""
    return FAST(name, config) | ({"ack_wait": 1_500_000_000} if config.get("ack_policy") == "explicit" else {})


class Clock:
    def now(self) -> datetime:
        return datetime.now(UTC)


class Journal:
    """Receipts on the real stream; the jobs that have ended."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.concluded: Counter[str] = Counter()

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        subject = receipt_subject(0, "default", receipts[0].user)
        for receipt in receipts:
            await self._broker.append(subject, msgspec.json.encode(receipt))

    async def conclude(self, job: Job, done: Done) -> None:
        self.concluded[job.id] += 1

    async def set_aside(self, job: Job, done: Done, payload: bytes) -> None:
        await store_job_letter(self._broker, job, done, payload)

    async def ended(self, job: Job) -> Done | None:
        return None


class Desk:
    """Sends into a list. Every third try of a job fails, and `before` may hold up or break a try."""

    repeatable = False

    def __init__(self) -> None:
        self.accepted: Counter[str] = Counter()
        self.tries: Counter[str] = Counter()
        self.order: list[str] = []
        self.before: Callable[[Job], Any] = lambda job: None
        self.held = False

    def slower(self, outcome: Outcome) -> float:
        return 1.0

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        return Hold(datetime.now(UTC), "killed:all") if self.held else Send(None, None)

    async def turn(self, job: Job, send: Send) -> float:
        return 0.0

    def unused(self, send: Send) -> None: ...

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        self.tries[job.id] += 1
        self.order.append(job.id)
        waiting = self.before(job)
        if waiting is not None:
            await waiting
        if len(self.order) % 3 == 0 and self.tries[job.id] < 3:
            return Outcome(kind="transient", code="503")
        self.accepted[job.id] += 1
        return Outcome(kind="ok")


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", 1, overrides=sooner)
        yield connection


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey.url) as client:
        yield client


@contextlib.asynccontextmanager
async def at_work(broker: Broker, redis: Redis, desk: Desk, journal: Journal) -> AsyncIterator[asyncio.Task[None]]:
    claims = RedisClaims(redis)
    handler = Handler(claims, JobsQueue(broker), journal, desk, POLICY, Clock())
    task = asyncio.create_task(Worker(broker, "push", handler).run(), name="worker")
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await claims.close()


def jobs(count: int, *, lane: str = "normal", prefix: str = "n") -> list[Job]:
    now = datetime.now(UTC)
    return [
        Job(
            id=f"{prefix}{number}",
            tenant="default",
            user=f"u{number % 7}",
            type="a.b",
            channel="push",
            lane=lane,  # type: ignore[arg-type]
            target="phone",
            first_at=now,
        )
        for number in range(count)
    ]


async def add(broker: Broker, made: Sequence[Job]) -> None:
    await broker.commit([message_of(job) for job in made])


async def all_done(broker: Broker) -> bool:
    return (await broker.stream("JOBS")).messages == 1  # the mark of the planner


async def ends(broker: Broker) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for stored in await whole_stream(broker, "RECEIPTS", "rcpt.0.>"):
        receipt = decode_receipt(stored.payload)
        found.setdefault(receipt.id or "", []).append(receipt.state)
    return found


async def test_jobs_of_all_lanes_are_tried_until_they_are_sent_and_then_nothing_is_left(
    broker: Broker, redis: Redis
) -> None:
    desk, journal = Desk(), Journal(broker)
    made = [one for lane in ("critical", "normal", "bulk") for one in jobs(60, lane=lane, prefix=lane)]
    await add(broker, made)
    async with at_work(broker, redis, desk, journal), at_work(broker, redis, desk, journal):
        await eventually(lambda: all_done(broker))
    assert desk.accepted == Counter(one.id for one in made)
    assert sum(desk.tries.values()) > len(made), "some were tried again"
    assert journal.concluded == desk.accepted
    for states in (await ends(broker)).values():
        assert states[-1] == "sent"
        assert set(states[:-1]) <= {"queued"}


async def test_a_worker_that_dies_in_the_middle_leaves_its_jobs_to_others_who_say_what_they_repeat(
    nats_server: NatsServer, broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.jobs.handling.LEASE_SECONDS", 1.0)
    monkeypatch.setattr("engine.jobs.handling.SEND_SECONDS", 0.5)
    monkeypatch.setattr("engine.jobs.worker.KEEP_SECONDS", 0.3)
    monkeypatch.setattr("engine.jobs.life.LEASE_MARGIN_SECONDS", 0.1)
    desk, never = Desk(), asyncio.Event()
    desk.before = lambda job: never.wait()
    made = jobs(5)
    claims = RedisClaims(redis)
    async with connected(nats_server.url) as doomed:
        worker = Worker(doomed, "push", Handler(claims, JobsQueue(doomed), Journal(doomed), desk, POLICY, Clock()))
        task = asyncio.create_task(worker.run(), name="doomed")
        await add(broker, made)
        await eventually(lambda: len(desk.order) == len(made))
        # As kill -9 does: nothing of it says or does anything any more.
        for job in list(worker._busy):
            job.cancel()
        for lane in worker._lanes.values():
            assert lane._subscription is not None
            lane._subscription.unsubscribe()
            lane._subscription = None
        worker._busy.clear()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await claims.close()
    desk.before = lambda job: None
    journal = Journal(broker)
    async with at_work(broker, redis, desk, journal):
        await eventually(lambda: all_done(broker), seconds=30)
    assert desk.accepted == Counter(one.id for one in made)
    for states in (await ends(broker)).values():
        assert "ambiguous" in states, "the first try may have been accepted"
        assert states[-1] == "sent"


async def test_a_worker_that_leaves_finishes_what_it_sends_and_hands_back_the_rest(
    broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.jobs.worker.AT_A_TIME", 2)
    desk, journal, go = Desk(), Journal(broker), asyncio.Event()
    desk.before = lambda job: go.wait()
    await add(broker, jobs(10))
    async with at_work(broker, redis, desk, journal) as task:
        await eventually(lambda: len(desk.order) == 2)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert sum(desk.tries.values()) == 2, "nothing new was begun"
    desk.before = lambda job: None
    async with at_work(broker, redis, desk, journal):
        await eventually(lambda: all_done(broker))
    assert len(desk.accepted) == 10
    assert set(desk.accepted.values()) == {1}
    assert not any("ambiguous" in states for states in (await ends(broker)).values())


@pytest.mark.parametrize("readable", [True, False], ids=["jobs", "messages it cannot read"])
async def test_a_worker_that_leaves_hands_back_what_is_on_its_way_to_it(
    nats_server: NatsServer, broker: Broker, redis: Redis, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """Else others would get it only once `ack_wait` is over: a code for a login would come a minute late."""
    # What is on order stays so while nothing is read.
    monkeypatch.setattr("engine.jobs.queue.PULL_EXPIRES_SECONDS", 60.0)
    monkeypatch.setattr("engine.jobs.queue.PULL_LOST_SECONDS", 120.0)
    name = job_consumer("push", "normal")

    async def consumer(**members: int) -> bool:
        found = await broker.api(f"CONSUMER.INFO.JOBS.{name}")
        return all(found[member] == value for member, value in members.items())

    async def all_kept() -> bool:
        return (await broker.stream("JOBS")).messages == 1 + 3  # with the mark of the planner

    config = (await broker.api(f"CONSUMER.INFO.JOBS.{name}"))["config"] | {"ack_wait": int(ACK_WAIT_SECONDS * 1e9)}
    await broker.api(f"CONSUMER.CREATE.JOBS.{name}", {"stream_name": "JOBS", "config": config})
    desk, journal = Desk(), Journal(broker)
    async with connected(nats_server.url) as theirs, at_work(theirs, redis, desk, journal) as task:
        await eventually(lambda: consumer(num_waiting=1), seconds=30)
        transport = cast("asyncio.ReadTransport", outgoing(theirs.nc))
        transport.pause_reading()
        if readable:
            await add(broker, jobs(3))
        else:
            for number in range(3):
                await broker.append("job.push.normal.default.u", b'{"id":"newer%d"}' % number)
        await eventually(lambda: consumer(num_ack_pending=3), seconds=30)
        task.cancel()
        await asyncio.sleep(0)
        transport.resume_reading()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await eventually(lambda: consumer(num_ack_pending=0), seconds=10)  # the last acknowledgement may be under way
    await eventually(all_kept, seconds=10)
    assert not desk.tries, "nothing was begun"
    assert [one async for one in letters(broker, Filter(kind="job"))] == []


async def test_held_jobs_stay_however_long_and_are_no_poison(broker: Broker, redis: Redis) -> None:
    desk, journal = Desk(), Journal(broker)
    desk.held = True
    decided: Counter[str] = Counter()
    right = desk.decide

    async def counted(job: Job) -> Any:
        decided[job.id] += 1
        return await right(job)

    desk.decide = counted  # type: ignore[method-assign]
    await add(broker, jobs(3))
    async with at_work(broker, redis, desk, journal):
        await eventually(lambda: len(decided) == 3 and min(decided.values()) > DELIVERIES_MAX + 1, seconds=30)
        assert not desk.tries
        desk.held = False
        await eventually(lambda: all_done(broker))
    assert set(desk.accepted.values()) == {1}
    assert {states[-1] for states in (await ends(broker)).values()} == {"sent"}


def test_lanes_take_turns_by_their_weights_and_bulk_is_never_starved() -> None:
    worker: Any = Worker.__new__(Worker)
    worker._turns = {"critical": 0, "normal": 0, "bulk": 0}

    class Full:
        def __init__(self, lane: str) -> None:
            self.waiting = self
            self.lane = lane

        def popleft(self) -> str:
            return self.lane

    worker._lanes = {lane: Full(lane) for lane in worker._turns}
    taken = Counter(worker._next() for _ in range(160))
    assert taken == {"critical": 120, "normal": 30, "bulk": 10}
    assert AT_A_TIME >= 16


async def test_a_lane_has_a_durable_of_its_own_and_nobody_else_reads_it(broker: Broker) -> None:
    listed = await broker.api("CONSUMER.NAMES.JOBS")
    wanted = {
        job_consumer(channel, lane)  # type: ignore[arg-type]
        for channel in ("push", "email", "sms", "webhook")
        for lane in ("critical", "normal", "bulk")
    }
    assert set(listed["consumers"]) == wanted
