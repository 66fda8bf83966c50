"""Reads a part of a stream once, in order and as fast as the broker gives it: for rebuilds, verification and benchmarks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import msgspec
from nats.nuid import NUID

from engine.broker import wire
from engine.broker.jetstream import Broker
from engine.errors import ApiError, BrokerError, TopologyError, Unanswered
from engine.limits import PULL_MESSAGES_MAX
from engine.log.incarnations import reaching
from engine.partition.reader import Delivered
from engine.patience import PATIENCE_SECONDS, PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, passes, patiently
from seamark.backoff import Backoff

BATCH: Final = 2000
"""Messages handed out at most at a time. More than that is kept on order, by pulls of `PULL_MESSAGES_MAX` at most."""

BYTES: Final = 8 << 20
"""Bytes of a pull."""

SILENCE_SECONDS: Final = 10.0
"""An election takes 4-9 s; after this long the reading head is made anew."""

INACTIVE_SECONDS: Final = 60.0
"""The broker removes a reading head that nobody pulls from."""


Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: how far long work has come."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


class _Broken(Exception):
    """Something was missed: go on with a new reading head."""


async def replay(broker: Broker, stream: str, subject: str, start: int, target: int) -> AsyncIterator[list[Delivered]]:
    """The messages of `subject` from sequence `start` on, in batches, up to the first one at or beyond `target`.

    After an interruption it goes on behind the last message it gave. `target` is the sequence of a message that existed;
    what age has removed meanwhile is not there.

    Raises:
        Unanswered: the broker gave nothing for a quarter of an hour. ApiError: it refuses, and asking again would not help.
        TopologyError: while it was away the stream was put back, or made anew.
    """
    heard_at, epoch = time.monotonic(), (await patiently(broker.stream, stream)).epoch
    backoff = Backoff(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX, jitter=0.5)
    while start <= target:
        head = _Head(broker, stream, subject)
        try:
            if backoff.failures and not await _is_left(broker, stream, subject, epoch, start, target):
                return
            await head.open(start)
            async for batch in head.batches(target):
                yield batch
                heard_at, start = time.monotonic(), batch[-1].seq + 1
                backoff.succeeded()
            return
        except (_Broken, BrokerError, TimeoutError) as error:
            if isinstance(error, ApiError) and not passes(error):
                raise
            if time.monotonic() - heard_at > PATIENCE_SECONDS:
                raise Unanswered(f"{stream} cannot be read beyond {start}: {error}") from error
            await asyncio.sleep(backoff.next_seconds())
        finally:
            await head.close()


async def _is_left(broker: Broker, stream: str, subject: str, epoch: str | None, start: int, target: int) -> bool:
    """After an interruption: is there anything left to read? What was to come may have aged meanwhile.

    Raises:
        TopologyError: the stream is not the one that was read before. BrokerError: as `Broker.leader_next`.
    """
    state = await reaching(broker, await broker.stream(stream), target)
    if state.epoch != epoch or state.last_seq < target:
        raise TopologyError(f"{stream} was put back, or made anew, while it was read", "Run it again.")
    following = await broker.leader_next(stream, subject, start)
    return following is not None and following.seq <= target


class _Head:
    """A consumer of our own, without acks, gone when we are."""

    def __init__(self, broker: Broker, stream: str, subject: str) -> None:
        self._broker = broker
        self._stream = stream
        # All records of a log: with a filter the broker would look for each among all users (ADR 0053). Marks come, too.
        self._filter = ">" if subject.startswith("log.") and subject.count(".") == 2 else subject
        self._prefix = subject.removesuffix(">").encode()
        self._name = f"replay-{NUID().next().decode()}"
        self._inbox = f"{broker.settings.inbox_prefix}.{NUID().next().decode()}"
        self._buffer: list[Delivered] = []
        self._outstanding = 0
        self._next = 1
        self._broken = ""
        self._refused: ApiError | None = None
        self._wake = asyncio.Event()
        self._subscription = broker.subscribe(self._inbox, self._on_message)

    async def open(self, start: int) -> None:
        """Make the consumer."""
        config: dict[str, Any] = {
            "name": self._name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, start),
            "ack_policy": "none",
            "replay_policy": "instant",
            "filter_subject": self._filter,
            "inactive_threshold": int(INACTIVE_SECONDS * 1e9),
            "mem_storage": True,
            "num_replicas": 1,
        }
        method = f"CONSUMER.CREATE.{self._stream}.{self._name}.{self._filter}"
        await self._broker.api(method, {"stream_name": self._stream, "config": config})

    async def batches(self, target: int) -> AsyncIterator[list[Delivered]]:
        """What comes, until `target` was seen."""
        while True:
            while self._outstanding <= BATCH and len(self._buffer) < BATCH:
                self._pull()
            if not self._buffer:
                self._wake.clear()
                async with asyncio.timeout(SILENCE_SECONDS):
                    await self._wake.wait()
            if self._buffer:
                batch, self._buffer = self._buffer[:BATCH], self._buffer[BATCH:]
                if batch[-1].seq >= target:
                    last = [one for one in batch if one.seq <= target]
                    if last:
                        yield last
                    return
                yield batch
            elif self._refused is not None:
                raise self._refused
            elif self._broken:
                raise _Broken(self._broken)

    async def close(self) -> None:
        """Remove the consumer."""
        self._subscription.unsubscribe()
        if not self._broker.connected:
            return
        try:
            await self._broker.api(f"CONSUMER.DELETE.{self._stream}.{self._name}", timeout_seconds=2.0)
        except BrokerError:
            return  # it goes by itself

    def _pull(self) -> None:
        number = min(BATCH, PULL_MESSAGES_MAX)
        body = {"batch": number, "max_bytes": BYTES, "expires": int(SILENCE_SECONDS * 1e9)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}"
        self._broker.publish(subject, msgspec.json.encode(body), reply=self._inbox)
        self._outstanding += number

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        self._wake.set()
        if not reply:
            self._on_status(headers)
            return
        self._outstanding -= 1
        _, word, consumer_seq, stored_at, _ = reply.rsplit(b".", 4)
        if self._broken or int(consumer_seq) != self._next:
            self._broken = self._broken or "a message was missed"
            return
        self._next += 1
        if subject.startswith(self._prefix):
            self._buffer.append(Delivered(subject, int(word), int(stored_at), headers, payload))

    def _on_status(self, headers: bytes) -> None:
        pending = wire.header(headers, b"Nats-Pending-Messages")
        self._outstanding = max(0, self._outstanding - int(pending)) if pending else 0
        code = wire.status(headers)
        if code == 409 and b"Exceeded" in headers:
            self._refused = ApiError(code, 0, wire.description(headers))  # such a pull is refused every time
        if code != 408 and not (code == 409 and (b"MaxBytes" in headers or b"Batch Completed" in headers)):
            self._broken = self._broken or f"the broker said {code}"
