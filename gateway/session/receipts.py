"""Receipts of the gateway: which range of a user's log a device was sent, and which it has acknowledged.

No receipt is written per record: a session is noted when something moved, and twice a second what all noted sessions
have to say is stored in atomic batches. A range that was acknowledged before its turn came is told once, as
acknowledged, with the time it was sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime
from time import time, time_ns
from typing import Protocol

import msgspec
import structlog

from engine.broker.jetstream import Broker, Outgoing
from engine.errors import BrokerError
from engine.tasks import end
from engine.traces.contexts import trace_line
from engine.traces.messages import receipts_stored
from engine.traces.spans import active
from gateway import metrics
from gateway.limits import RECEIPT_BATCH, RECEIPT_SECONDS, RECEIPTS_QUEUED
from gateway.session.traces import SessionTraces
from seamark.backoff import Backoff
from seamark.protocol.events import INAPP
from seamark.protocol.receipts import Receipt
from seamark.protocol.subjects import receipt_subject

_log = structlog.get_logger("seamark.receipts")

RETRY_SECONDS_MAX = 5.0
"""Longest pause between two tries to store a batch."""


_encode = msgspec.json.Encoder().encode


def acknowledged(
    partition: int, tenant: str, user: str, device: str, epoch: str, after: int, up_to: int, trace: str | None = None
) -> Outgoing:
    """The receipt of what a device acknowledges by a request of its own, now. `trace`: of a delivery that is followed."""
    receipt = Receipt(user, INAPP, "acknowledged", _moment(time()), device, None, epoch, after, up_to, trace=trace)
    return Outgoing(receipt_subject(partition, tenant, user), _encode(receipt), trace_line(trace) if trace else b"")


class Source(Protocol):
    """A session with something to tell."""

    def take_receipts(self) -> list[Outgoing]:
        """What has happened since it was last asked."""
        ...


class Tally:
    """What one session has sent and what was acknowledged, of one epoch, until it is told."""

    __slots__ = ("acked", "acked_at", "acked_told", "noted", "sent", "sent_at", "sent_told")

    def __init__(self, base: int) -> None:
        self.sent = self.sent_told = base
        self.acked = self.acked_told = base
        self.sent_at = 0.0
        self.acked_at = 0.0
        self.noted = False

    def take(
        self, partition: int, tenant: str, user: str, device: str, epoch: str, traces: SessionTraces | None = None
    ) -> list[Outgoing]:
        """The receipts due now; the ranges count as told. `traces`: where they belong to deliveries that are followed."""
        self.noted = False
        due: list[tuple[str, float, int, int, datetime | None]] = []
        if self.acked > self.acked_told:
            # Something newer may have been sent since; what was acknowledged was sent before it was.
            untold = self.acked > self.sent_told and self.sent_at
            sent_at = _moment(min(self.sent_at, self.acked_at)) if untold else None
            due.append(("acknowledged", self.acked_at, self.acked_told, self.acked, sent_at))
            self.acked_told = self.acked
            self.sent_told = max(self.sent_told, self.acked)
        if self.sent > self.sent_told:
            due.append(("sent", self.sent_at, self.sent_told, self.sent, None))
            self.sent_told = self.sent
        if not due:
            return []
        subject = receipt_subject(partition, tenant, user)
        receipts: list[Outgoing] = []
        for state, at, after, up_to, sent_at in due:
            trace = traces.newest(after, up_to) if traces is not None and traces.sent else None
            receipt = Receipt(user, INAPP, state, _moment(at), device, None, epoch, after, up_to, sent_at, trace=trace)
            receipts.append(Outgoing(subject, _encode(receipt), trace_line(trace) if trace else b""))
        return receipts


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds * 1000) / 1000, UTC)


class Receipts:
    """Stores receipts. They wait for a broker that is away, up to a bound; beyond it the oldest are dropped and counted."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._spans = active()
        self._noted: list[Source] = []
        self._queue: deque[Outgoing] = deque()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to store."""
        self._task = asyncio.create_task(self._run(), name="receipts")

    def note(self, source: Source) -> None:
        """`source` has something to tell; it sees to it that it is noted once only until it was asked."""
        self._noted.append(source)

    def add(self, receipts: list[Outgoing]) -> None:
        """Queue receipts of a session that ends or changes its epoch."""
        for receipt in receipts:
            if len(self._queue) >= RECEIPTS_QUEUED:
                self._queue.popleft()
                metrics.gateway_receipts.labels("dropped").inc()
            self._queue.append(receipt)

    async def close(self, timeout_seconds: float) -> None:
        """Store what is left, within the deadline; what cannot be is counted as dropped."""
        await end(self._task)
        self._collect()
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._queue:
                    await self._store()
        except Exception as error:
            metrics.gateway_receipts.labels("dropped").inc(len(self._queue))
            _log.error("receipts_dropped", count=len(self._queue), error=f"{type(error).__name__}: {error}")

    def _collect(self) -> None:
        noted, self._noted = self._noted, []
        for source in noted:
            try:
                self.add(source.take_receipts())
            except Exception:
                _failed("one session's receipts are left out")

    async def _run(self) -> None:
        backoff = Backoff(2 * RECEIPT_SECONDS, RETRY_SECONDS_MAX, jitter=0.5)
        pause = RECEIPT_SECONDS
        while True:
            await asyncio.sleep(pause)
            self._collect()
            try:
                while self._queue:
                    await self._store()
                pause = RECEIPT_SECONDS
                backoff.succeeded()
            except BrokerError as error:
                pause = backoff.next_seconds()
                _log.warning("receipts_wait", count=len(self._queue), error=f"{type(error).__name__}: {error}")
            except Exception:
                _failed("a batch of receipts was dropped, the next one is stored")

    async def _store(self) -> None:
        """One batch. An unanswered one is stored again: a receipt told twice says nothing new.

        A batch that fails through a fault of ours is dropped: it would fail again, and hold up all batches after it.
        """
        batch = [self._queue.popleft() for _ in range(min(RECEIPT_BATCH, len(self._queue)))]
        since = time_ns()
        try:
            if len(batch) == 1 and not batch[0].headers:
                await self._broker.append(batch[0].subject, batch[0].payload, budget_seconds=1.0)
            else:
                await self._broker.commit(batch)
        except (BrokerError, asyncio.CancelledError):
            self._queue.extendleft(reversed(batch))
            raise
        except Exception:
            metrics.gateway_receipts.labels("dropped").inc(len(batch))
            raise
        metrics.gateway_receipts.labels("stored").inc(len(batch))
        if self._spans is not None:
            receipts_stored(self._spans, batch, since)


def _failed(consequence: str) -> None:
    """Log the error being handled: a fault of ours must not end the task that serves all sessions."""
    metrics.gateway_receipts.labels("failed").inc()
    _log.exception("receipts_failed", consequence=consequence)
