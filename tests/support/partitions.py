"""A partition to read: its stream and consumer, publishers of numbered messages, and a worker whose store tells every mistake."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from engine.broker.jetstream import Broker, StreamState
from engine.errors import PartitionStopped, StepDown
from engine.partition.reader import Delivered, PartitionReader, Source
from engine.topology.files import render
from tests.support.logs import eventually
from tests.support.topology import Overrides

PIN_TIMEOUT_SECONDS = 1.0
"""For tests that do not mind when a pin is lost: each pause of this process may cost it."""

SOURCE = Source("EV", "reader", "ev.0.>")


class Store:
    """Where the effect and the position of the partition live. It refuses whoever is not the last to have acquired it."""

    def __init__(self) -> None:
        self.next_seq = 1
        self.owner: object = None
        self.applied: list[int] = []
        self.changed = asyncio.Event()

    def apply(self, owner: object, batch: list[Delivered]) -> None:
        if owner is not self.owner:
            raise StepDown("another owner")
        for message in batch:
            assert message.seq >= self.next_seq, "a message came again, or out of order"
            assert message.payload == b"%d" % len(self.applied), "a message was passed over"
            self.applied.append(message.seq)
            self.next_seq = message.seq + 1

    def pass_over(self, owner: object, seq: int) -> None:
        if owner is not self.owner:
            raise StepDown("another owner")
        self.next_seq = max(self.next_seq, seq + 1)


class RecordingWorker:
    """Applies to a store; `before` may stop, delay or fail a batch, `after` the answer to it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.acquired = 0
        self.batches = 0
        self.before: Callable[[list[Delivered]], Awaitable[None]] | None = None
        self.after: Callable[[], None] | None = None
        self.refusal: PartitionStopped | None = None
        self.token = object()

    async def acquire(self) -> int:
        if self.refusal:
            raise self.refusal
        self.acquired += 1
        self.token = self._store.owner = object()
        return self._store.next_seq

    async def position(self) -> int:
        if self.refusal:
            raise self.refusal
        return self._store.next_seq

    def check(self, state: StreamState) -> None:
        """Nothing is ever wrong with the stream."""

    async def pass_over(self, seq: int) -> None:
        self._store.pass_over(self.token, seq)

    async def handle(self, batch: list[Delivered]) -> None:
        self.batches += 1
        if self.before:
            await self.before(batch)
        self._store.apply(self.token, batch)
        if self.after:
            self.after()


async def make_stream(broker: Broker, replicas: int = 1, *, pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS) -> None:
    await broker.api(
        "STREAM.CREATE.EV",
        {"name": "EV", "subjects": ["ev.>"], "storage": "file", "num_replicas": replicas, "allow_direct": True},
    )
    await make_consumer(broker, replicas, pin_timeout_seconds=pin_timeout_seconds)


async def make_consumer(
    broker: Broker, replicas: int = 1, *, pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS, subject: str = "ev.0.>"
) -> None:
    """The shipped consumer of a dispatcher, under a name, with a time-out and for a subject of its own."""
    overrides = Overrides(replicas=replicas, pin_timeout_seconds=pin_timeout_seconds)
    shipped = next(one for one in render("dev", 1, overrides=overrides).consumers if one.name == "dispatch-0")
    config = shipped.config | {"name": "reader", "durable_name": "reader", "filter_subject": subject}
    body = {"stream_name": "EV", "config": config}
    await broker.api(f"CONSUMER.CREATE.EV.reader.{subject}", body)


class Load:
    """Publishes numbered messages of the partition, with others between them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._dice = random.Random(7)
        self.count = 0

    async def publish(self, count: int) -> None:
        for _ in range(count):
            if self._dice.random() < 0.3:
                self._broker.publish("ev.1.other", b"x")
            self._broker.publish("ev.0.one", b"%d" % self.count)
            self.count += 1
        await self._broker.flush()

    async def others(self, count: int) -> int:
        """Messages of another partition; the sequence of the last. They are stored: a flush says only that they have arrived."""
        for _ in range(count):
            ack = await self._broker.append("ev.1.other", b"x")
        return ack.seq

    async def surely(self, count: int) -> None:
        """One by one, through whatever happens to the server."""
        for _ in range(count):
            await self._broker.append("ev.0.one", b"%d" % self.count, msg_id=f"m{self.count}")
            self.count += 1


@contextlib.asynccontextmanager
async def reading(
    broker: Broker,
    worker: Any,
    *,
    pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS,
    quiet_seconds: float | None = None,
) -> AsyncIterator[PartitionReader]:
    """A reader at work.

    Args:
        pin_timeout_seconds: as the consumer has it.
        quiet_seconds: after which silence the leader is asked; None: as the time-out of the pin has it.
    """
    reader = PartitionReader(broker, SOURCE, worker, pin_timeout_seconds=pin_timeout_seconds)
    if quiet_seconds is not None:
        reader._quiet_seconds = quiet_seconds
    task = asyncio.create_task(reader.run(), name="reader")
    try:
        yield reader
    finally:
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task  # a reader that failed says why, whatever else did not happen then


async def done(store: Store, load: Load, *, seconds: float = 30) -> None:
    await eventually(lambda: len(store.applied) >= load.count, seconds=seconds)
    assert len(store.applied) == load.count
