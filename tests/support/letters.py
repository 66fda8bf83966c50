"""Jobs that die, and what becomes of them: a worker whose desk says what it is told, and all stores behind it."""

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import msgspec
from redis.asyncio import Redis

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.channels.channel import Job, Outcome
from engine.directory.changing import Directory
from engine.dispatch.claims import release
from engine.jobs.claims import Done
from engine.jobs.desk import Hold, Over, Send, Split
from engine.jobs.handling import Handler
from engine.jobs.messages import message_of
from engine.jobs.queue import JobsQueue
from engine.jobs.receipts import receipts_of
from engine.jobs.redisclaims import RedisClaims
from engine.jobs.retry import RetryPolicy
from engine.jobs.worker import Worker
from engine.letters.reading import Filter, Found, letters
from engine.letters.replaying import Replays
from engine.log.incarnations import epoch_of
from engine.partition.reader import Delivered
from engine.plan.rules import Channel
from engine.postgres import Pool
from engine.worker.journal import WorkerJournal
from projections.deliveries.ends import JobEnds
from projections.deliveries.table import DeliveriesStore
from projections.inbox.table import InboxStore
from projections.store import Checkpoint
from seamark.protocol.receipts import Planned, Receipt
from seamark.protocol.subjects import encode_user, receipt_subject
from tests.support.logs import eventually
from tests.support.projections import delivered

POLICY = RetryPolicy((0.05, 0.1, 0.1), (0, 1), 60)
TENANT, USER = "acme", "ann@example.com"


class Clock:
    def now(self) -> datetime:
        return datetime.now(UTC)


class Desk:
    """Says what it was told to say, and counts what was taken."""

    repeatable = False

    def __init__(self) -> None:
        self.outcome = Outcome(kind="permanent", provider="relay", code="550 5.7.1", known=False)
        self.accepted: Counter[str] = Counter()

    def slower(self, outcome: Outcome) -> float:
        return 1.0

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        return Send(None, None)

    async def turn(self, job: Job, send: Send) -> float:
        return 0.0

    def unused(self, send: Send) -> None: ...

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        if self.outcome.kind == "ok":
            self.accepted[job.key] += 1
        return self.outcome


@dataclass
class World:
    broker: Broker
    redis: Redis
    claims: RedisClaims
    pool: Pool
    desk: Desk = field(default_factory=Desk)
    checkpoint: Checkpoint | None = None

    @property
    def directory(self) -> Directory:
        return Directory(self.pool)

    @property
    def ends(self) -> JobEnds:
        return JobEnds(self.pool, self.broker, 1)

    @property
    def journal(self) -> WorkerJournal:
        return WorkerJournal(self.broker, 1, self.directory, self.ends)

    @property
    def replays(self) -> Replays:
        return Replays(self.broker, self.ends, self.claims, partial(release, self.redis))

    async def fold(self) -> None:
        """Have `deliveries` know all receipts that are stored."""
        after = 0 if self.checkpoint is None else self.checkpoint.seq
        batch = [delivered(one) for one in await whole_stream(self.broker, "RECEIPTS", "rcpt.0.>") if one.seq > after]
        if batch:
            epoch = epoch_of(await self.broker.stream("RECEIPTS"))
            reached = Checkpoint(epoch, batch[-1].seq)
            assert await DeliveriesStore(self.pool, 0).apply(batch, self.checkpoint, reached)
            self.checkpoint = reached

    async def work(self, *jobs: Job, channel: Channel = "email") -> None:
        """Have a worker do these jobs, and whatever waits, until nothing does."""
        if jobs:
            await self.broker.commit([message_of(job) for job in jobs])
        handler = Handler(self.claims, JobsQueue(self.broker), self.journal, self.desk, POLICY, Clock())
        task = asyncio.create_task(Worker(self.broker, channel, handler).run(), name="worker")
        try:
            await eventually(self._all_done)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.fold()

    async def _all_done(self) -> bool:
        return (await self.broker.stream("JOBS")).messages == 1  # the mark of the planner

    async def letters(self, **wanted: Any) -> list[Found]:
        return [one async for one in letters(self.broker, Filter(**wanted))]

    async def states(self) -> list[tuple[str, int]]:
        rows = await self.pool.fetch("SELECT state, attempts FROM deliveries ORDER BY id, device")
        return [tuple(row) for row in rows]


def job(id: str, **more: Any) -> Job:
    given: dict[str, Any] = {"tenant": TENANT, "user": USER, "type": "order.shipped", "channel": "email"}
    given |= {"first_at": datetime.now(UTC), "data": {"text": "the parcel for ann"}}
    return Job(id=id, **(given | more))


async def dead(world: World, *jobs: Job, outcome: Outcome | None = None) -> None:
    """Store letters of jobs that have failed at their first try, and the receipts of that."""
    done = Done(0, "failed", "x", outcome or Outcome(kind="permanent", provider="relay", code="550"))
    for one in jobs:
        await world.journal.conclude(one, done)
        await world.journal.store(one, receipts_of(one, done, datetime.now(UTC)))
    await world.fold()


async def known_to_the_inbox(world: World, *ids: str, user: str, type: str = "a.b", ago: timedelta) -> None:
    """The records of notifications, as the inbox folds them."""
    subject, stored = f"log.0.{TENANT}.{encode_user(user)}".encode(), (datetime.now(UTC) - ago).timestamp()
    batch = []
    for seq, id in enumerate(ids, 1):
        plan = {"webhook": {"when": "now", "why": "requested"}}
        record = {"id": id, "kind": "notification", "tenant": TENANT, "user": user, "type": type, "plan": plan}
        body = msgspec.json.encode(record | {"data": {"text": "hi"}, "at": "2026-01-31T12:00:00Z"})
        batch.append(Delivered(subject, seq, round(stored * 1e9), b"", body))
    assert await InboxStore(world.pool, 0).apply(batch, None, Checkpoint("e", len(ids)))


async def planned(world: World, one: Job, when: str, at: datetime, why: str = "default") -> None:
    """The receipt of a plan, as a planner stores it."""
    plan = {one.channel: Planned(when, why)}
    said = Receipt(user=one.user, channel="", state="planned", at=at, id=one.id, term=1, plan=plan)
    subject = receipt_subject(0, one.tenant, one.user)
    await world.broker.append(subject, msgspec.json.encode(said))
