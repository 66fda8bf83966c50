"""A bucket of many entries, held whole: read once, and from then on what is new in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from engine.broker.jetstream import Broker, Stored
from engine.errors import ApiError, BrokerError, Forbidden, Unanswered
from engine.limits import CONTROL_READ_SECONDS
from engine.tasks import set_or_after

_log = structlog.get_logger("seamark.tail")

PAGE: Final = 1000

BACK_SECONDS: Final = 5.0
"""For so long a bucket must show less than was read of it to be taken for one that was put back to a backup. A leader that was
deposed shows the past for a moment, and nothing must be forgotten because of it."""

_NO_STREAM: Final = 10059


class BucketTail:
    """Follows a bucket. The leader says how far it goes, any replica shows what is there: one that lags cannot pass for fresh.

    Args:
        bucket: its name; all its keys are followed.
        add: called with every entry, oldest first; an entry that was replaced meanwhile may never be shown.
        forget: called when the bucket was made anew, before its entries.
        was_read: called whenever all of it is known.
        missing_is_empty: before `seamark topology apply` there is no bucket, and it is known that nothing is in it.

    Attributes:
        stream: the bucket's.
        seq: how far the bucket was read.
        read_at: when the leader was asked that had nothing more to show, by the monotonic clock; 0 before the first time.
        remedy: what an operator has to do so that it can be read; empty where nothing is known to be wrong.
    """

    def __init__(
        self,
        broker: Broker,
        bucket: str,
        add: Callable[[str, Stored], None],
        forget: Callable[[], None],
        *,
        was_read: Callable[[], None] = lambda: None,
        missing_is_empty: bool = False,
    ) -> None:
        self._broker = broker
        self.stream, self._keys = f"KV_{bucket}", f"$KV.{bucket}."
        self._add, self._forget, self._was_read = add, forget, was_read
        self._missing_is_empty = missing_is_empty
        self._epoch: str | None = None
        self._written, self._read = asyncio.Event(), asyncio.Event()
        self.seq = 0
        self.read_at = 0.0
        self.remedy = ""
        self._back_since: float | None = None

    @property
    def age_seconds(self) -> float:
        """How long ago everything in it was known."""
        return time.monotonic() - self.read_at if self.read_at else float("inf")

    async def run(self) -> None:
        """Follow until cancelled: at once when something is written, and twice a second as that may be lost."""
        subscription = self._broker.subscribe(f"{self._keys}>", lambda *_: self.look())
        self._broker.on_reconnect.append(self.look)
        try:
            while True:
                await self._read_safely()
                await set_or_after(self._written, CONTROL_READ_SECONDS)
        finally:
            self._broker.on_reconnect.remove(self.look)
            subscription.unsubscribe()

    def look(self) -> None:
        """Look for what is new, soon."""
        self._written.set()

    async def read_again(self) -> None:
        """Return when it was read once more; the caller sets the deadline."""
        await self._read.wait()

    async def read_up_to(self, seq: int) -> None:
        """Return once the bucket was read up to `seq`; the caller sets the deadline."""
        while self.seq < seq or not self.read_at:
            self.look()
            await self._read.wait()

    async def _read_safely(self) -> None:
        asked_at = time.monotonic()
        try:
            await self._read_new()
        except BrokerError as error:
            missing = isinstance(error, ApiError) and error.err_code == _NO_STREAM
            if not (missing and self._missing_is_empty):
                self._report(error, missing=missing)
                return
            self._begin_anew(None)
        self.remedy = ""
        self.read_at = asked_at
        self._was_read()
        self._read.set()
        self._read.clear()

    def _report(self, error: BrokerError, *, missing: bool) -> None:
        remedy = ""
        if missing:
            remedy = f"there is no stream {self.stream}: run `seamark topology apply`"
        elif isinstance(error, Forbidden):
            remedy = (
                f"the broker's user may not read {self.stream}: give the server the `accounts.conf` of this version"
            )
        # It is asked twice a second, and what has to be done is said once.
        say = _log.debug if remedy == self.remedy else _log.error
        say("bucket_not_read", stream=self.stream, error=f"{type(error).__name__}: {error}", remedy=remedy)
        self.remedy = remedy

    def _begin_anew(self, epoch: str | None) -> None:
        self._forget()
        self._epoch, self.seq, self._back_since = epoch, 0, None

    async def _read_new(self) -> None:
        state = await self._broker.stream(self.stream)
        if state.epoch != self._epoch or self._is_put_back(state.last_seq):
            self._begin_anew(state.epoch)  # it is the first look, or the bucket was made anew
        while self.seq < state.last_seq:
            page = await self._broker.next_by_subject(self.stream, f"{self._keys}>", self.seq + 1, batch=PAGE)
            found = page.records
            if not found:
                # A replica that lags, or what was there was replaced by something newer: the leader knows.
                first = await self._broker.leader_next(self.stream, f"{self._keys}>", self.seq + 1)
                found = [] if first is None else [first]
            for stored in found:
                self._add(stored.subject.removeprefix(self._keys), stored)
            self.seq = found[-1].seq if found else state.last_seq

    def _is_put_back(self, last_seq: int) -> bool:
        """Whether the bucket ends before what was read of it, and has for a while.

        Raises:
            Unanswered: it does so now.
        """
        if last_seq >= self.seq:
            self._back_since = None
            return False
        now = time.monotonic()
        self._back_since = self._back_since or now
        if now - self._back_since < BACK_SECONDS:
            raise Unanswered(f"it ends at {last_seq}, and was read up to {self.seq}")
        return True
