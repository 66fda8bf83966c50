"""Builds the unread counts anew beside the live ones and switches to them."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.patience import patiently
from projections.projection import UNREAD
from projections.rebuild.folding import Horizon, Partition, Rebuilt, another_rebuild
from projections.replay import Progress, no_progress
from projections.retention.counts import forget_counts, read_left
from projections.store import Checkpoint
from projections.unread.carry import carried, carry_given_up
from projections.unread.store import FIRST_VERSION, UnreadStore, drop_version, read_version, write_version


async def rebuild_unread(broker: Broker, redis: Redis, partitions: int, *, progress: Progress = no_progress) -> Rebuilt:
    """Fold all logs into the next version, switch, forget the former one.

    Raises:
        StoreUnavailable, BrokerError: nothing has changed for readers. TopologyError: a log is missing or has no epoch.
    """
    live = await read_version(redis)
    version = live + 1
    work = [_Counts(broker, redis, live, p, progress) for p in range(partitions)]
    try:
        for p in range(partitions):
            if await read_version(redis) != live:
                raise another_rebuild()  # it has switched to the version that was to be made here
            await drop_version(redis, p, version)
            if live > FIRST_VERSION:
                await drop_version(redis, p, live - 1)  # a rebuild that was killed after its switch has left it
        for one in work:
            await one.fold()
        for one in work:  # what has come meanwhile
            asked_at = time.monotonic()
            await one.fold()
            if one.store.reached is not None:
                age = time.monotonic() - asked_at
                await one.store.attend(one.store.reached, complete=True, age_seconds=age, now=time.time())
        await write_version(redis, version)
        left = await read_left(redis)  # what a month that went meanwhile has taken off the former version only
        for p in range(partitions):
            await forget_counts(redis, p, left)
        for p in range(partitions):
            await drop_version(redis, p, live)
    finally:
        for one in work:
            await one.store.close()
    records, taken_over = sum(one.partition.records for one in work), sum(one.carried for one in work)
    return Rebuilt(UNREAD.name, version, records, taken_over)


class _Counts:
    """The counts of one partition, in the version that follows `live`."""

    def __init__(self, broker: Broker, redis: Redis, live: int, number: int, progress: Progress) -> None:
        self._redis = redis
        self._live = live
        self.partition = Partition(broker, UNREAD, number, progress)
        self.store = UnreadStore(redis, number, version=live + 1)
        self.carried = 0

    async def fold(self) -> None:
        """Fold up to the end of the log; the first time from the oldest record there is."""
        horizon = await self.partition.horizon()

        async def begin(first: int, at: datetime) -> Checkpoint:
            return await self._carry(horizon, first)

        await self.partition.fold(self.store, await self.partition.head(), horizon.oldest, begin)

    async def _carry(self, horizon: Horizon, oldest: int) -> Checkpoint:
        """What still counts of records before `oldest`, which the log has lost, is taken over from the live version."""
        at: Checkpoint | None = None
        to = Checkpoint(horizon.epoch, oldest - 1)
        number = self.partition.number
        live = await UnreadStore(self._redis, number, version=self._live).checkpoint()
        former = live is not None and live.epoch != to.epoch
        if live is not None and (former or horizon.trimmed or oldest > horizon.oldest):
            # Of a former incarnation all is taken over, as the inbox does, and comes before the first record of this one.
            oldest, shift = (live.seq + 1, live.seq + 1) if former else (oldest, 0)
            async for users, count in carried(self._redis, number, self._live, oldest, shift):
                await patiently(self._take_over, users, at, to)
                at = to
                self.carried += count
            await carry_given_up(self._redis, number, self._live, self._live + 1, shift)
        if at is None:
            await patiently(self._take_over, {}, at, to)
        return to

    async def _take_over(self, users: dict[str, list[Any]], at: Checkpoint | None, to: Checkpoint) -> None:
        """Do operations. Done twice they give the same."""
        # Refused also where it was done, and only the answer was lost: the stored checkpoint tells.
        if not await self.store.carry(users, at, to) and await self.store.checkpoint() != to:
            raise another_rebuild()
