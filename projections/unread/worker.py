"""Folds one log into unread counts, tells live sessions, and says how fresh the counts are."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Final

import structlog
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.errors import BrokerError, StoreUnavailable
from engine.partition.reader import PartitionReader, Phase
from engine.tasks import end_if_cancelled, set_or_after
from projections import metrics
from projections.projection import UNREAD
from projections.runner import ProjectionWorker
from projections.store import Checkpoint
from projections.unread.frames import UnreadFrames
from projections.unread.reader import USERS_MAX, UnreadReader
from projections.unread.store import Applied, Counted, UnreadStore

_log = structlog.get_logger("seamark.unread")

ATTEND_SECONDS: Final = 2.0
"""How often it is looked after what has expired and how fresh the counts are; `STALE_SECONDS` leaves room for five."""

NEGLECTED_SECONDS: Final = 5.0
"""Counts nobody has attended to for so long, a standby attends to."""

TOUCHED_MAX: Final = 100_000
"""Users remembered while catching up, to be told their count at the end; some 10 MB."""


class UnreadWorker(ProjectionWorker):
    """The projection `unread` of one partition.

    While it catches up with what the log held when it took over, counts are stored as being behind and nobody is told: a
    count on its way up from nothing is no count.
    """

    def __init__(self, broker: Broker, partition: int, redis: Redis) -> None:
        self._unread = UnreadStore(redis, partition, applied=self._changed)
        super().__init__(broker, UNREAD, partition, self._unread)
        self._partition = partition
        self._frames = UnreadFrames(broker, partition)
        self._reader = UnreadReader(redis)
        self._touched: dict[str, None] = {}
        self._missed: Checkpoint | None = None
        self._wake = asyncio.Event()

    async def acquire(self) -> int:
        """As every projection; and from here on, counts are behind until what the log holds now is in them."""
        next_seq = await super().acquire()
        newest = await self._broker.leader_last(self._stream, self._subject)
        self._unread.until = newest.seq if newest is not None else 0
        self._touched.clear()
        self._wake.set()
        return next_seq

    def _changed(self, applied: Applied) -> None:
        if self._unread.catching_up or not applied.users:
            for user in applied.touched:
                self._touched.pop(user, None)
                self._touched[user] = None
            self._forget_most_distant()
        else:
            self._frames.tell(applied.users, applied.seq)
        if not self._unread.catching_up and (self._touched or not applied.users):
            self._wake.set()

    def _forget_most_distant(self) -> None:
        surplus = len(self._touched) - TOUCHED_MAX
        if surplus > 0:
            metrics.unread_frames.labels("forgotten").inc(surplus)
            for user in list(self._touched)[:surplus]:
                del self._touched[user]

    async def tend(self, reader: PartitionReader) -> None:
        """Beside the reader: expiry, freshness, and the counts of those who were touched while catching up."""
        self._wake.set()
        try:
            while True:
                end_if_cancelled()
                await set_or_after(self._wake, ATTEND_SECONDS)
                await self._attend_safely(reader)
        finally:
            self._frames.close()
            await self._unread.close()
            await self._reader.close()

    async def _attend_safely(self, reader: PartitionReader) -> None:
        try:
            if reader.phase is Phase.READING:
                if await self._unread.superseded():
                    reader.take_over_again()
                    return
                reached = self._unread.reached or await self._begin()
                if reached is not None and not await self._attend(reached):
                    self._suspect(reader, reached)
            elif reader.phase is Phase.STANDBY and await self._neglected():
                reached = await self._unread.checkpoint() or await self._begin()
                if reached is not None:
                    await self._attend(reached)
        except (BrokerError, StoreUnavailable, OSError, TimeoutError) as error:
            self._log.debug("counts_not_attended", error=type(error).__name__, detail=str(error)[:200])
        except Exception:
            # Without this task counts turn stale though they are not; what we did not foresee must not end it.
            self._log.exception("attending_failed")

    async def _neglected(self) -> bool:
        """Whether nobody attends: where there is nothing to read, no reader has been chosen yet."""
        counts = await self._reader.read(self._partition, [])
        return counts.checkpoint is None or counts.age_seconds > NEGLECTED_SECONDS

    def _suspect(self, reader: PartitionReader, reached: Checkpoint) -> None:
        """Twice in a row another checkpoint is stored than the one reached: Redis has lost its data, or gone back."""
        if self._missed == reached == self._unread.reached:
            self._log.warning("checkpoint_gone_back", reached=str(reached))
            self._missed = None
            reader.take_over_again()
        else:
            self._missed = reached

    async def _attend(self, reached: Checkpoint) -> bool:
        """False: another checkpoint is stored."""
        asked_at = time.monotonic()
        waiting = await self._broker.leader_next(self._stream, self._subject, reached.seq + 1)
        now = time.time()
        age = time.monotonic() - asked_at if waiting is None else now - datetime.fromisoformat(waiting.time).timestamp()
        due = await self._unread.attend(reached, complete=waiting is None, age_seconds=age, now=now)
        if due is None:
            return False
        self._frames.tell(due, reached.seq)
        await self._tell_touched()
        return True

    async def _tell_touched(self) -> None:
        while self._touched and not self._unread.catching_up:
            users = [self._touched.popitem()[0] for _ in range(min(USERS_MAX, len(self._touched)))]
            counts = await self._reader.read(self._partition, users)
            if counts.checkpoint is not None:
                told = [Counted(user, unread) for user, unread in zip(users, counts.users, strict=True)]
                self._frames.tell(told, counts.checkpoint.seq)

    async def _begin(self) -> Checkpoint | None:
        """A log that holds no record has no count to come: store the checkpoint that the first batch would."""
        state = await self._broker.stream(self._stream)
        if state.epoch is None:
            return None
        if await self._broker.leader_next(self._stream, self._subject, 1) is not None:
            return None
        checkpoint = Checkpoint(state.epoch, state.last_seq)
        if not await self._unread.begin(checkpoint):
            return None
        if self._epoch == state.epoch:
            self._expected = checkpoint
        return checkpoint
