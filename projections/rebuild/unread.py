"""Builds the unread counts anew beside the live ones and switches to them."""

from __future__ import annotations

import time
from typing import Any

from redis.asyncio import Redis

from engine.broker.jetstream import Broker, StreamState
from engine.errors import TopologyError
from engine.log.incarnations import epoch_of, stream_of
from engine.partition.reader import Delivered
from projections.postgres.patience import patiently
from projections.rebuild.tables import Progress, Rebuilt
from projections.replay import replay
from projections.retention.counts import forget_counts, read_left
from projections.store import Checkpoint, StoreBroken, StoreUnavailable
from projections.unread.carry import carried, carry_given_up
from projections.unread.store import FIRST_VERSION, UnreadStore, drop_version, read_version, write_version
from projections.verify.unread import UnreadVerification
from seamark.protocol.subjects import log_stream

__all__ = ["UnreadVerification", "rebuild_unread"]

UNREAD = "unread"


async def rebuild_unread(broker: Broker, redis: Redis, partitions: int, *, progress: Progress | None = None) -> Rebuilt:
    """Fold all logs into the next version, switch, forget the former one.

    Raises:
        StoreUnavailable, BrokerError: nothing has changed for readers. TopologyError: a log is missing or has no epoch.
    """
    live = await read_version(redis)
    version = live + 1
    work = _Rebuild(broker, redis, live, progress)
    stores = [UnreadStore(redis, p, version=version) for p in range(partitions)]
    try:
        for p in range(partitions):
            if await read_version(redis) != live:
                raise _another()  # it has switched to the version that was to be made here
            await drop_version(redis, p, version)
            if live > FIRST_VERSION:
                await drop_version(redis, p, live - 1)  # a rebuild that was killed after its switch has left it
        for last in (False, True):  # the second time: what has come meanwhile
            for p, store in enumerate(stores):
                asked_at = time.monotonic()
                await work.fold(store, p)
                if last and store.reached is not None:
                    age = time.monotonic() - asked_at
                    await store.attend(store.reached, complete=True, age_seconds=age, now=time.time())
        await write_version(redis, version)
        left = await read_left(redis)  # what a month that went meanwhile has taken off the former version only
        for p in range(partitions):
            await forget_counts(redis, p, left)
        for p in range(partitions):
            await drop_version(redis, p, live)
    finally:
        for store in stores:
            await store.close()
    return Rebuilt(UNREAD, version, work.records, work.carried)


class _Rebuild:
    """What one rebuild does with each partition."""

    def __init__(self, broker: Broker, redis: Redis, live: int, progress: Progress | None) -> None:
        self._broker = broker
        self._redis = redis
        self._live = live
        self._progress = progress
        self.records = 0
        self.carried = 0

    async def fold(self, store: UnreadStore, partition: int) -> None:
        """Fold up to the end of the log; the first time from the oldest record there is."""
        stream, subject = log_stream(partition), f"log.{partition}.>"
        state = await patiently(lambda: stream_of(self._broker, stream))
        newest = await patiently(lambda: self._broker.leader_last(stream, subject))
        at = await patiently(store.checkpoint)
        epoch = epoch_of(state)
        if newest is None:
            if at is None:
                await self._carry(store, partition, state, state.last_seq + 1)
            return
        async for batch in replay(self._broker, stream, subject, 1 if at is None else at.seq + 1, newest.seq):
            if at is None:
                at = await self._carry(store, partition, state, batch[0].seq)
            reached = Checkpoint(epoch, batch[-1].seq)
            await _apply(store, batch, at, reached)
            at = reached
            self.records += len(batch)
            if self._progress is not None:
                self._progress(partition, at.seq, newest.seq)

    async def _carry(self, store: UnreadStore, partition: int, state: StreamState, oldest: int) -> Checkpoint:
        """What still counts of records before `oldest`, which the log has lost, is taken over from the live version."""
        at: Checkpoint | None = None
        to = Checkpoint(state.epoch or "", oldest - 1)
        live = await UnreadStore(self._redis, partition, version=self._live).checkpoint()
        former = live is not None and live.epoch != to.epoch
        if live is not None and (former or state.first_seq > 1):
            # Of a former incarnation all is taken over, as the inbox does, and comes before the first record of this one.
            oldest, shift = (live.seq + 1, live.seq + 1) if former else (oldest, 0)
            async for users, count in carried(self._redis, partition, self._live, oldest, shift):
                await _carry_over(store, users, at, to)
                at = to
                self.carried += count
            await carry_given_up(self._redis, partition, self._live, self._live + 1, shift)
        if at is None:
            await _carry_over(store, {}, at, to)
        return to


async def _carry_over(store: UnreadStore, users: dict[str, list[Any]], at: Checkpoint | None, to: Checkpoint) -> None:
    """Take operations over, however long Redis is away. Done twice they give the same."""

    async def carry() -> None:
        # Refused also where it was done, and only the answer was lost: the stored checkpoint tells.
        if not await store.carry(users, at, to) and await store.checkpoint() != to:
            raise _another()

    await patiently(carry)


async def _apply(store: UnreadStore, batch: list[Delivered], at: Checkpoint | None, reached: Checkpoint) -> None:
    """Fold a batch in, however long Redis is away. What of it is in already, the stored checkpoint tells."""
    while True:
        refused = False
        try:
            if await store.apply(batch, at, reached):
                return
            refused = True
        except StoreUnavailable as error:
            if isinstance(error, StoreBroken):
                raise
        stored = await patiently(store.checkpoint)
        if stored == reached:
            return
        if stored != at:
            if stored is None or at is None or not at.seq < stored.seq < reached.seq:
                raise _another()
            batch, at = [message for message in batch if message.seq > stored.seq], stored
        elif refused:
            raise _another()


def _another() -> TopologyError:
    return TopologyError("another rebuild has begun", "Run one rebuild of a projection at a time.")
