"""The control bucket: what operators and roles tell all processes, as values of one type under keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec
import structlog

from engine.broker.jetstream import After, Broker, Stored
from engine.errors import BrokerError
from engine.limits import CONTROL_READ_SECONDS
from engine.tasks import set_or_after
from seamark.protocol.subjects import CONTROL_BUCKET

CONTROL_STREAM: Final = f"KV_{CONTROL_BUCKET}"
_KEYS: Final = f"$KV.{CONTROL_BUCKET}."

_log = structlog.get_logger("seamark.control")

T = TypeVar("T")


class Entry(NamedTuple, Generic[T]):
    """The value of a key, None where there is none, and its revision, 0 where the key was never written."""

    value: T | None
    revision: int


class ControlBucket(Generic[T]):
    """Entries of the control bucket, which is small: one read shows all of it. Buckets of many entries have a `BucketTail`.

    Args:
        type: what their values are, written as JSON.
        prefix: how their keys begin, with a dot at its end; other keys are not looked at.

    Attributes:
        read_at: when all entries were last read by `watch`, by the monotonic clock; 0 before the first time.
    """

    def __init__(self, broker: Broker, type: type[T], prefix: str = "") -> None:
        self._broker = broker
        self._prefix = _KEYS + prefix
        self._decode = msgspec.json.Decoder(type).decode
        self._read_up_to = 0
        self.read_at = 0.0

    async def get(self, key: str) -> Entry[T]:
        """The entry as the leader has it.

        Raises:
            msgspec.DecodeError: it holds something else.
        """
        stored = await self._broker.leader_last(CONTROL_STREAM, self._prefix + key)
        if stored is None:
            return Entry(None, 0)
        return Entry(self._decode(stored.payload) if stored.payload else None, stored.seq)

    async def put(self, key: str, value: T, revision: int) -> int:
        """Replace the entry if it still has this revision; returns the new revision.

        Raises:
            ApiError: 10071 or 10164 when it is not.
        """
        after = After(CONTROL_STREAM, revision)
        return (await self._broker.append(self._prefix + key, msgspec.json.encode(value), after=after)).seq

    async def watch(self, tell: Callable[[dict[str, T]], None]) -> None:
        """Call `tell` with all entries by key, now and after each change, until it is cancelled.

        All are read every half second, so no message that gets lost hides a change. Writes to the bucket are heard here as well,
        sometimes before they are stored: they only make the next read come sooner.
        """
        written, last = asyncio.Event(), None
        subscription = self._broker.subscribe(f"{self._prefix}>", lambda *_: written.set())
        try:
            while True:
                try:
                    entries = await self._read_all()
                except BrokerError as error:
                    _log.debug("control_bucket_not_read", error=type(error).__name__)
                else:
                    if entries is not None and entries != last:
                        last = entries
                        tell(entries)
                await set_or_after(written, CONTROL_READ_SECONDS)
        finally:
            subscription.unsubscribe()

    async def _read_all(self) -> dict[str, T] | None:
        """All entries; None where a replica that lags has shown less than was read before."""
        found, up_to = await self._broker.last_of_each(CONTROL_STREAM, f"{self._prefix}>")
        # The newest message of a bucket is never removed: if the leader does not have it, this is another bucket.
        if up_to < self._read_up_to and await self._broker.leader_next(CONTROL_STREAM, f"{_KEYS}>", self._read_up_to):
            return None
        self._read_up_to, self.read_at = up_to, time.monotonic()
        entries = ((stored.subject.removeprefix(self._prefix), self._value(stored)) for stored in found)
        return {key: value for key, value in entries if value is not None}

    def _value(self, stored: Stored) -> T | None:
        try:
            return self._decode(stored.payload) if stored.payload else None
        except msgspec.DecodeError as error:
            _log.error("control_entry_not_read", subject=stored.subject, why=str(error))
            return None
