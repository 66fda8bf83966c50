"""A bucket of many entries, held whole: read once, and from then on what is new in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from engine.broker.jetstream import Broker, Stored
from engine.errors import ApiError, BrokerError
from engine.limits import CONTROL_READ_SECONDS
from engine.tasks import set_or_after

_log = structlog.get_logger("seamark.tail")

PAGE: Final = 1000


class BucketTail:
    """Follows a bucket. The leader says how far it goes, any replica shows what is there: one that lags cannot pass for fresh.

    Args:
        bucket: its name; all its keys are followed.
        add: called with every entry, oldest first; an entry that was replaced meanwhile may never be shown.
        forget: called when the bucket was made anew, before its entries.

    Attributes:
        seq: how far the bucket was read.
        read_at: when the leader was asked that had nothing more to show, by the monotonic clock; 0 before the first time.
    """

    def __init__(
        self, broker: Broker, bucket: str, add: Callable[[str, Stored], None], forget: Callable[[], None]
    ) -> None:
        self._broker = broker
        self._stream, self._keys = f"KV_{bucket}", f"$KV.{bucket}."
        self._add, self._forget = add, forget
        self._epoch: str | None = None
        self._written, self._read = asyncio.Event(), asyncio.Event()
        self.seq = 0
        self.read_at = 0.0

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

    async def read_up_to(self, seq: int) -> None:
        """Return once the bucket was read up to `seq`; the caller sets the deadline."""
        while self.seq < seq or not self.read_at:
            self.look()
            await self._read.wait()

    async def _read_safely(self) -> None:
        asked_at = time.monotonic()
        try:
            await self._read_new()
        except ApiError as error:
            _log.warning("bucket_not_read", bucket=self._stream, why=str(error))
            return
        except BrokerError as error:
            _log.debug("bucket_not_read", bucket=self._stream, error=type(error).__name__)
            return
        self.read_at = asked_at
        self._read.set()
        self._read.clear()

    async def _read_new(self) -> None:
        state = await self._broker.stream(self._stream)
        if state.epoch != self._epoch or state.last_seq < self.seq:
            self._forget()  # it is the first look, or the bucket was made anew
            self._epoch, self.seq = state.epoch, 0
        while self.seq < state.last_seq:
            page = await self._broker.next_by_subject(self._stream, f"{self._keys}>", self.seq + 1, batch=PAGE)
            found = page.records
            if not found:
                # A replica that lags, or what was there was replaced by something newer: the leader knows.
                first = await self._broker.leader_next(self._stream, f"{self._keys}>", self.seq + 1)
                found = [] if first is None else [first]
            for stored in found:
                self._add(stored.subject.removeprefix(self._keys), stored)
            self.seq = found[-1].seq if found else state.last_seq
