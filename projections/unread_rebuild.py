"""Builds the unread counts anew beside the live ones and switches to them; holds the live ones against the plain fold."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from engine.errors import TopologyError
from engine.jetstream import Broker
from engine.partition import Delivered
from engine.subjects import log_stream
from projections.rebuild import Progress, Rebuilt
from projections.replay import replay
from projections.store import Checkpoint
from projections.unread import UnreadStore, drop_version, read_version, write_version
from projections.unread_fold import NONE_UNREAD, UserFold
from projections.unread_reader import USERS_MAX, UnreadReader
from projections.verify import Difference, Verified

if TYPE_CHECKING:
    from collections.abc import Iterable

UNREAD = "unread"


async def rebuild_unread(broker: Broker, redis: Redis, partitions: int, *, progress: Progress | None = None) -> Rebuilt:
    """Fold all logs into the next version, switch, forget the former one.

    Raises:
        StoreUnavailable, BrokerError: nothing has changed for readers.
    """
    live = await read_version(redis)
    version = live + 1
    records = 0
    stores = [UnreadStore(redis, p, version=version) for p in range(partitions)]
    try:
        for p in range(partitions):
            await drop_version(redis, p, version)
        for last in (False, True):  # the second time: what has come meanwhile
            for p, store in enumerate(stores):
                records += await _fold(broker, store, p, progress)
                if last and store.reached is not None:
                    await store.attend(store.reached, complete=True, age_seconds=0.0, now=time.time())
        await write_version(redis, version)
        for p in range(partitions):
            await drop_version(redis, p, live)
    finally:
        for store in stores:
            await store.close()
    return Rebuilt(UNREAD, version, records, 0)


async def _fold(broker: Broker, store: UnreadStore, partition: int, progress: Progress | None) -> int:
    stream, subject = log_stream(partition), f"log.{partition}.>"
    state = await broker.stream(stream)
    newest = await broker.leader_last(stream, subject)
    at = await store.checkpoint()
    if state.epoch is None:
        raise TopologyError(f"{stream} has no epoch", "Run `seamark topology apply`.")
    if newest is None:
        if at is None:
            await store.begin(Checkpoint(state.epoch, state.last_seq))
        return 0
    records = 0
    async for batch in replay(broker, stream, subject, 1 if at is None else at.seq + 1, newest.seq):
        reached = Checkpoint(state.epoch, batch[-1].seq)
        if not await store.apply(batch, at, reached):
            raise TopologyError("another rebuild has begun", "Run one rebuild of a projection at a time.")
        at = reached
        records += len(batch)
        if progress is not None:
            progress(partition, at.seq, newest.seq)
    return records


class UnreadVerification:
    """As `projections.verify.Verification`, for the counts in Redis."""

    def __init__(self, broker: Broker, redis: Redis, partitions: int) -> None:
        self._broker = broker
        self._redis = redis
        self._partitions = partitions
        self.result = Verified(UNREAD)

    async def differences(self) -> AsyncIterator[Difference]:
        """Every user whose count is another one than the fold of the log up to the count's own position.

        Raises:
            StoreUnavailable, BrokerError: it could not be told. TopologyError: another incarnation of a log.
        """
        reader = UnreadReader(self._redis)
        try:
            for p in range(self._partitions):
                async for difference in self._partition(reader, p):
                    self.result.differences += 1
                    yield difference
        finally:
            await reader.close()

    async def _partition(self, reader: UnreadReader, p: int) -> AsyncIterator[Difference]:
        stream, subject = log_stream(p), f"log.{p}.>"
        users: dict[str, UserFold] = {}
        at = 0
        checkpoint = (await reader.read(p, [])).checkpoint
        if checkpoint is None:
            return
        state = await self._broker.stream(stream)
        if state.epoch != checkpoint.epoch:
            raise TopologyError(
                f"unread was folded from another incarnation of {stream}", "Run `seamark rebuild unread`."
            )
        at = await self._advance(users, stream, subject, at, checkpoint.seq)
        names = list(users)
        for start in range(0, len(names), USERS_MAX):
            part, now = names[start : start + USERS_MAX], time.time()
            counts = await reader.read(p, part, now)
            if counts.checkpoint is None or counts.checkpoint.epoch != state.epoch:
                raise TopologyError("Redis has lost its counts meanwhile", "Run it again.")
            at = await self._advance(users, stream, subject, at, counts.checkpoint.seq)
            for user, stored in zip(part, counts.users, strict=True):
                self.result.compared += 1
                expected = users[user].count(round(now * 1000))
                if stored != expected and (stored, expected) != (NONE_UNREAD, NONE_UNREAD):
                    yield Difference("unread", user.split("."), stored=stored, expected=expected)

    async def _advance(self, users: dict[str, UserFold], stream: str, subject: str, at: int, to: int) -> int:
        newest = await self._broker.leader_last(stream, subject)
        if newest is None or to <= at:
            return at
        async for batch in replay(self._broker, stream, subject, at + 1, min(to, newest.seq)):
            _apply(users, batch)
        return to


def _apply(users: dict[str, UserFold], batch: Iterable[Delivered]) -> None:
    for record in batch:
        try:
            user = record.subject.split(b".", 2)[2].decode()
        except UnicodeDecodeError:
            continue
        fold = users.get(user)
        if fold is None:
            fold = users[user] = UserFold()
        fold.apply(record.seq, record.time_nanoseconds // 1_000_000, record.headers, record.payload)
