"""JOBS as workers see it: jobs are pulled lane by lane, kept while they are worked on, acknowledged, and scheduled again."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from engine.broker import wire
from engine.broker.connection import Subscription
from engine.broker.jetstream import Broker
from engine.channels.channel import Job, Lane
from engine.countedline import CountedLine
from engine.errors import Unanswered, Unavailable
from engine.jobs.messages import (
    NO_JOB,
    Unreadable,
    decode_job,
    job_consumer,
    message_of,
    schedule_as_it_stands,
    schedule_of,
    times_put_back,
    unreadable_job,
)
from engine.plan.rules import Channel
from seamark.protocol.subjects import JOBS_STREAM

ACK_WAIT_SECONDS: Final = 60.0
"""After so much silence the broker hands a job out again: `ack_wait` of the consumers. Longer than a lease, so that whoever gets
it then finds the lease over."""

KEEP_SECONDS: Final = ACK_WAIT_SECONDS / 4
"""How often the broker is told that a job is still worked on: three such words may be lost."""

PULL_EXPIRES_SECONDS: Final = 5.0
"""When a pull ends by itself. A worker knows when it ordered what the pull brings, and not when the broker handed it out. So this
is shorter than `ALONE_SECONDS`."""

PULL_LOST_SECONDS: Final = 2 * PULL_EXPIRES_SECONDS
"""After so much silence the broker has lost a pull, or this process stood still: it orders anew."""

_ACK_WORDS: Final = 9
"""`$JS.ACK.<stream>.<consumer>.<delivered>.…`; a longer form has a domain and an account before the stream."""


class PulledJob:
    """A job as the broker has handed it out. An `engine.jobs.desk.Delivery`."""

    def __init__(self, broker: Broker, reply: bytes, job: Job, ordered_at: float) -> None:
        self._broker = broker
        self._reply = reply
        self._ordered_at = ordered_at
        self.job = job
        self.deliveries = deliveries_of(reply)

    @property
    def held_seconds(self) -> float:
        """How long ago it was handed out, at most: when it was ordered. It may have waited for a process that stood still."""
        return time.monotonic() - self._ordered_at

    async def ack(self, confirmed: bool) -> None:
        """Acknowledge. `confirmed`: return when the broker has said that it knows.

        Raises:
            BrokerError: it could not be said, or nobody knows whether it was heard.
        """
        if confirmed:
            await self._broker.request(self._reply.decode(), b"+ACK")
        else:
            self._broker.write(b"PUB %b 4\r\n+ACK\r\n" % self._reply)

    def keep(self) -> None:
        """Tell the broker that it is worked on."""
        try:
            self._broker.publish(self._reply, b"+WPI")
        except Unavailable:
            return  # said again soon; at worst somebody else gets it, too, and finds its claim


class PulledUnreadable(NamedTuple):
    """A message that cannot be read. Unless it is put back or set aside, it is handed out again after `ack_wait`.

    Args:
        headers: the raw block.
        times: how often workers have put it back.
    """

    broker: Broker
    reply: bytes
    subject: bytes
    headers: bytes
    unreadable: Unreadable
    times: int = 0

    async def end(self) -> None:
        """Have it handed out no more; returns when the broker has said that it knows.

        Raises:
            BrokerError: it could not be said, or nobody knows whether it was heard.
        """
        await self.broker.request(self.reply.decode(), b"+TERM")

    async def put_back(self, seconds: float) -> None:
        """Have it handed out anew in so many seconds, as it stands; until then it holds no place among what is handed out.

        Raises:
            BrokerError: that is not done, or nobody knows. Where it is, the message may be there twice: it has one letter, and
                a worker that can read it takes it for one that others may have begun.
        """
        due = datetime.now(UTC) + timedelta(seconds=seconds)
        made = schedule_as_it_stands(self.subject, self.headers, self.unreadable.payload, due, self.times + 1)
        await self.broker.append(made.subject, made.payload, made.named_headers, msg_id=made.subject)
        await self.end()


def deliveries_of(reply: bytes) -> int:
    """How often the message was handed out, by the subject on which it is acknowledged."""
    words = reply.split(b".")
    return int(words[4] if len(words) == _ACK_WORDS else words[6])


@dataclass(slots=True)
class _Order:
    """A pull that has not ended: when it was ordered, by the monotonic clock, and how many jobs it may still bring."""

    at: float
    left: int


class PulledLane:
    """One lane of a channel: what was pulled and not begun yet, and what is on order.

    Args:
        on_news: called when a message has come.
        on_unreadable: called with a message that cannot be read.
    """

    def __init__(
        self,
        broker: Broker,
        channel: Channel,
        lane: Lane,
        on_news: Callable[[], None],
        on_unreadable: Callable[[PulledUnreadable], None],
    ) -> None:
        self._broker = broker
        self._channel: Channel = channel
        self._on_news = on_news
        self._on_unreadable = on_unreadable
        self.lane = lane
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{job_consumer(channel, lane)}"
        self._inbox = f"{broker.settings.inbox_prefix}.jobs-{channel}-{lane}-{id(self):x}"
        self._subscription: Subscription | None = None
        self._orders: deque[_Order] = deque()
        self._renewed = 0
        self._closed = False
        self._unreadable = CountedLine("seamark.worker", "job_unreadable", channel=channel, lane=lane)
        self.waiting: deque[PulledJob] = deque()

    async def open(self) -> None:
        """Be ready for jobs."""
        self._subscription = self._broker.subscribe(f"{self._inbox}-{self._renewed}", self._on_message)
        await self._subscription.confirmed()

    async def close(self) -> None:
        """Order no more, and take what is on its way: nobody else gets that until `ack_wait` is over.

        In a cluster, what the consumer's leader sends while it does not know yet that nobody listens is not taken.
        """
        self._closed = True
        if self._subscription is not None:
            # Without a connection nothing comes any more: it is handed out again after `ack_wait`.
            with contextlib.suppress(Unanswered):
                await self._subscription.drain()

    def lacks(self, most: int) -> bool:
        """Whether it is time to order: fewer than half of `most` jobs are on order or waiting."""
        if self._orders and time.monotonic() - self._orders[0].at > PULL_LOST_SECONDS:
            self._renew()
        return self._missing(most) > most // 2

    def _missing(self, most: int) -> int:
        return most - sum([one.left for one in self._orders]) - len(self.waiting)

    def order(self, most: int) -> None:
        """Have up to `most` jobs on order or waiting."""
        if not self.lacks(most):
            return
        count = self._missing(most)
        body = {"batch": count, "expires": int(PULL_EXPIRES_SECONDS * 1e9)}
        order = _Order(time.monotonic(), count)
        try:
            self._broker.publish(self._subject, msgspec.json.encode(body), reply=f"{self._inbox}-{self._renewed}")
        except Unavailable:
            return  # asked again soon
        self._orders.append(order)

    def _renew(self) -> None:
        """Forget what is on order. What it brings all the same is not taken, and handed out again: nobody knows how old it is."""
        if self._closed:
            return
        self._orders.clear()
        self._renewed += 1
        if self._subscription is not None:
            self._subscription.unsubscribe()
        self._subscription = self._broker.subscribe(f"{self._inbox}-{self._renewed}", self._on_message)

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        if not reply or wire.status(headers):
            # A pull has ended: by its time, or because the consumer has another leader. What it still owed is asked for anew.
            pending = wire.header(headers, b"Nats-Pending-Messages")
            if pending:
                self._brought(int(pending))
            else:
                self._renew()
            return
        ordered_at = self._brought(1)
        try:
            job = decode_job(payload)
        except NO_JOB as error:
            # Only planners and workers write here: a newer version, or a fault of ours.
            self._unreadable.add(deliveries=deliveries_of(reply), error=type(error).__name__)
            unreadable = unreadable_job(self._channel, subject, payload)
            self._on_unreadable(
                PulledUnreadable(self._broker, reply, subject, headers, unreadable, times_put_back(headers))
            )
        else:
            if times_put_back(headers):  # as it stood, so it does not say itself that there may be two of it
                job = replace(job, again=True)
            self.waiting.append(PulledJob(self._broker, reply, job, ordered_at))
        self._on_news()

    def _brought(self, count: int) -> float:
        """So many that were on order have come, or will not come. Since when they were, for sure: the oldest order's time."""
        ordered_at = self._orders[0].at if self._orders else 0.0
        while self._orders and count:
            taken = min(count, self._orders[0].left)
            self._orders[0].left -= taken
            count -= taken
            if not self._orders[0].left:
                self._orders.popleft()
        return ordered_at


class JobsQueue:
    """What workers write into JOBS. An `engine.jobs.desk.Queue`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def schedule(self, job: Job, due: datetime) -> None:
        """Have the job handed out at `due`.

        The name is its message id, too: a write that comes late, after the one that was made in its place has fired, would hand
        out the job a second time, and nobody could tell.
        """
        made = schedule_of(job, due)
        await self._broker.append(made.subject, made.payload, made.named_headers, msg_id=made.subject)

    async def add(self, jobs: Sequence[Job]) -> None:
        """Have the jobs handed out: all of them or none. There are no more than a user has targets."""
        if jobs:
            await self._broker.commit([message_of(job) for job in jobs])
