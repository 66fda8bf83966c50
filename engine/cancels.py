"""Which transactions were cancelled: a bucket of its own, held whole by everybody who must not send what is in one of them.

A cancelled transaction stays cancelled for 31 days, for longer than anything can be scheduled ahead. Who reads the
bucket knows how fresh its view is: whatever was stored more than a second before is in it, or it says that it is not fresh.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import msgspec
import structlog

from engine import metrics
from engine.broker.jetstream import Broker, Stored
from engine.broker.tail import BucketTail
from engine.limits import CANCEL_KEPT_SECONDS, CANCELS_FRESH_SECONDS, CANCELS_PATIENCE_SECONDS
from engine.tasks import end
from seamark.protocol.errors import InvalidToken
from seamark.protocol.events import new_event_id
from seamark.protocol.subjects import CANCELS_BUCKET, encode_token

CANCELS_STREAM: Final = f"KV_{CANCELS_BUCKET}"
_KEYS: Final = f"$KV.{CANCELS_BUCKET}."

_log = structlog.get_logger("seamark.cancels")


class _Cancel(msgspec.Struct):
    """What the bucket holds of one."""

    at: datetime


class Cancels:
    """The cancelled transactions, as the leader of their bucket had them a moment ago."""

    def __init__(self, broker: Broker) -> None:
        # Before `seamark topology apply` nobody can have cancelled anything.
        self.tail = BucketTail(
            broker, CANCELS_BUCKET, self._add, self._forget, was_read=self._was_read, missing_is_empty=True
        )
        self._held: dict[str, float] = {}
        """By `<tenant>.<transaction>` in the order they were stored; when, in Unix seconds."""
        self._of_tenants: Counter[str] = Counter()
        self._given_up = False

    def holds(self, tenant: str, transaction: str) -> bool:
        """Whether this transaction is cancelled, as far as is known here. `tenant`: its token."""
        try:
            return f"{tenant}.{encode_token(transaction)}" in self._held
        except InvalidToken:
            return False  # an earlier version has let it pass: nobody can cancel what has such a name

    def of_tenant(self, tenant: str) -> int:
        """How many cancelled transactions of a tenant, named by its token, are kept."""
        return self._of_tenants[tenant]

    @property
    def fresh(self) -> bool:
        """Whether everything is known that was stored more than a second ago."""
        return self.tail.age_seconds <= CANCELS_FRESH_SECONDS

    @property
    def fresh_until(self) -> float:
        """Until when that stays so, by the monotonic clock; for ever where this was waited for in vain."""
        return math.inf if self._given_up else self.tail.read_at + CANCELS_FRESH_SECONDS

    async def heard(self) -> None:
        """Return when the view is fresh. Once in an outage this waits for up to 10 s, then goes on without.

        An election among brokers is over by then. Whoever waits holds up everything behind it in its partition.
        """
        if self.fresh or self._given_up:
            return
        try:
            async with asyncio.timeout(CANCELS_PATIENCE_SECONDS):
                while not self.fresh:
                    await self.tail.read_again()
        except TimeoutError:
            self._given_up = True
            metrics.cancels_unheard.set(1)
            _log.error(
                "cancels_not_heard", remedy=f"look at the stream {CANCELS_STREAM}: what is cancelled now goes out"
            )

    def _was_read(self) -> None:
        if self._given_up:
            self._given_up = False
            metrics.cancels_unheard.set(0)
        self._let_go()

    def _add(self, key: str, stored: Stored) -> None:
        if self._held.pop(key, None) is None:
            self._of_tenants[key.partition(".")[0]] += 1
        self._held[key] = datetime.fromisoformat(stored.time).timestamp()

    def _let_go(self) -> None:
        """What the bucket no longer holds by now, as it was stored so long ago."""
        before = time.time() - CANCEL_KEPT_SECONDS
        while self._held and (key := next(iter(self._held))) and self._held[key] < before:
            del self._held[key]
            tenant = key.partition(".")[0]
            self._of_tenants[tenant] -= 1
            if not self._of_tenants[tenant]:
                del self._of_tenants[tenant]

    def _forget(self) -> None:
        self._held.clear()
        self._of_tenants.clear()


async def is_cancelled(broker: Broker, tenant: str, transaction: str) -> bool:
    """The same, asked of the bucket's leader: for who asks once."""
    subject = f"{_KEYS}{encode_token(tenant)}.{encode_token(transaction)}"
    return await broker.leader_last(CANCELS_STREAM, subject) is not None


async def cancel(broker: Broker, tenant: str, transaction: str, *, budget_seconds: float) -> None:
    """Store that a transaction is cancelled; cancelled once more, it is kept for another 31 days.

    Raises:
        ApiError, Unavailable, Unanswered: as `Broker.append`; it may be stored again.
    """
    subject = f"{_KEYS}{encode_token(tenant)}.{encode_token(transaction)}"
    body = msgspec.json.encode(_Cancel(datetime.now(UTC)))
    await broker.append(subject, body, msg_id=new_event_id(), budget_seconds=budget_seconds)


@asynccontextmanager
async def watching(broker: Broker) -> AsyncIterator[Cancels]:
    """The cancelled transactions, kept fresh for as long as the block runs."""
    cancels = Cancels(broker)
    task = asyncio.create_task(cancels.tail.run(), name="cancels-watch")
    try:
        yield cancels
    finally:
        await end(task)
