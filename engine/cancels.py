"""Which transactions were cancelled: a bucket of its own, held whole by everybody who must not send what is in one of them.

A cancelled transaction stays cancelled for 31 days, for longer than anything can be scheduled ahead. Who reads the
bucket knows how fresh its view is: whatever was stored more than a second before is in it, or it says that it is not fresh.
"""

from __future__ import annotations

import asyncio
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
from engine.broker.refusals import is_missing
from engine.errors import ApiError, BrokerError
from engine.limits import CANCEL_KEPT_SECONDS, CANCELS_FRESH_SECONDS, CANCELS_PATIENCE_SECONDS, CANCELS_READ_SECONDS
from engine.tasks import end, set_or_after
from seamark.protocol.events import new_event_id
from seamark.protocol.subjects import CANCELS_BUCKET, encode_token

CANCELS_STREAM: Final = f"KV_{CANCELS_BUCKET}"
_KEYS: Final = f"$KV.{CANCELS_BUCKET}."
_PAGE: Final = 1000

_log = structlog.get_logger("seamark.cancels")


class _Cancel(msgspec.Struct):
    """What the bucket holds of one."""

    at: datetime


class Cancels:
    """The cancelled transactions, as the leader of their bucket had them a moment ago.

    The leader says how far its bucket goes, any replica shows what is there; so a replica that lags cannot pass for fresh.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._held: dict[
            str, float
        ] = {}  # by `<tenant>.<transaction>` in the order they were stored; when, in Unix seconds
        self._of_tenants: Counter[str] = Counter()
        self._seq = 0
        self._epoch: str | None = None
        self._fresh_at = -CANCELS_PATIENCE_SECONDS
        self._given_up = False
        self._read = asyncio.Event()

    def holds(self, tenant: str, transaction: str) -> bool:
        """Whether this transaction is cancelled, as far as is known here. `tenant`: its token."""
        return f"{tenant}.{encode_token(transaction)}" in self._held

    def of_tenant(self, tenant: str) -> int:
        """How many cancelled transactions of a tenant, named by its token, are kept."""
        return self._of_tenants[tenant]

    @property
    def fresh(self) -> bool:
        """Whether everything is known that was stored more than a second ago."""
        return time.monotonic() - self._fresh_at <= CANCELS_FRESH_SECONDS

    async def heard(self) -> None:
        """Return when the view is fresh. Once in an outage this waits for up to 10 s, then goes on without.

        An election among brokers is over by then. Whoever waits holds up everything behind it in its partition.
        """
        if self.fresh or self._given_up:
            return
        try:
            async with asyncio.timeout(CANCELS_PATIENCE_SECONDS):
                while not self.fresh:
                    await self._read.wait()
        except TimeoutError:
            self._given_up = True
            metrics.cancels_unheard.set(1)
            _log.error(
                "cancels_not_heard", remedy=f"look at the stream {CANCELS_STREAM}: what is cancelled now goes out"
            )

    async def watch(self) -> None:
        """Keep the view fresh; ends by cancellation."""
        written = asyncio.Event()
        subscription = self._broker.subscribe(f"{_KEYS}>", lambda *_: written.set())
        try:
            while True:
                await self._read_safely()
                await set_or_after(written, CANCELS_READ_SECONDS)
        finally:
            subscription.unsubscribe()

    async def _read_safely(self) -> None:
        asked_at = time.monotonic()
        try:
            await self._read_new()
        except ApiError as error:
            if not is_missing(error):
                _log.debug("cancels_not_read", error=str(error))
                return
            self._forget()  # before `seamark topology apply` nobody can have cancelled anything
        except BrokerError as error:
            _log.debug("cancels_not_read", error=type(error).__name__)
            return
        self._fresh_at = asked_at
        if self._given_up:
            self._given_up = False
            metrics.cancels_unheard.set(0)
        self._read.set()
        self._read.clear()

    async def _read_new(self) -> None:
        state = await self._broker.stream(CANCELS_STREAM)
        if state.epoch != self._epoch or state.last_seq < self._seq:
            self._forget()  # it is the first look, or the bucket was made anew
            self._epoch = state.epoch
        while self._seq < state.last_seq:
            page = await self._broker.next_by_subject(CANCELS_STREAM, f"{_KEYS}>", self._seq + 1, batch=_PAGE)
            found = page.records
            if not found:
                # A replica that lags, or what was there has been replaced by something newer: the leader knows.
                first = await self._broker.leader_next(CANCELS_STREAM, f"{_KEYS}>", self._seq + 1)
                found = [] if first is None else [first]
            for stored in found:
                self._add(stored)
            self._seq = found[-1].seq if found else state.last_seq
        self._let_go()

    def _add(self, stored: Stored) -> None:
        key = stored.subject.removeprefix(_KEYS)
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
        self._seq = 0


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
    task = asyncio.create_task(cancels.watch(), name="cancels-watch")
    try:
        yield cancels
    finally:
        await end(task)
