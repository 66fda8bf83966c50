"""Builds the unread counts anew beside the live ones and switches to them; holds the live ones against the plain fold."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from engine.errors import TopologyError
from engine.incarnations import stream_of
from engine.jetstream import Broker, StreamState
from engine.partition import Delivered
from engine.subjects import log_stream
from projections.rebuild import Progress, Rebuilt
from projections.replay import replay
from projections.store import Checkpoint
from projections.unread import (
    FIRST_VERSION,
    UnreadStore,
    asked,
    drop_version,
    meta_key,
    read_version,
    scanned,
    write_version,
)
from projections.unread_carry import carried, carry_given_up
from projections.unread_fold import NONE_UNREAD, UserFold
from projections.unread_reader import USERS_MAX, UnreadReader
from projections.verify import Difference, Verified

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        state = await stream_of(self._broker, stream)
        newest = await self._broker.leader_last(stream, subject)
        at = await store.checkpoint()
        if state.epoch is None:
            raise TopologyError(f"{stream} has no epoch", "Run `seamark topology apply`.")
        if newest is None:
            if at is None:
                await self._carry(store, partition, state, state.last_seq + 1)
            return
        async for batch in replay(self._broker, stream, subject, 1 if at is None else at.seq + 1, newest.seq):
            if at is None:
                at = await self._carry(store, partition, state, batch[0].seq)
            reached = Checkpoint(state.epoch, batch[-1].seq)
            if not await store.apply(batch, at, reached):
                raise _another()
            at = reached
            self.records += len(batch)
            if self._progress is not None:
                self._progress(partition, at.seq, newest.seq)

    async def _carry(self, store: UnreadStore, partition: int, state: StreamState, oldest: int) -> Checkpoint:
        """What still counts of records before `oldest`, which the log has lost, is taken over from the live version."""
        at: Checkpoint | None = None
        to = Checkpoint(state.epoch or "", oldest - 1)
        live = await UnreadStore(self._redis, partition, version=self._live).checkpoint()
        if state.first_seq > 1 and live is not None and live.epoch == to.epoch:
            async for users, count in carried(self._redis, partition, self._live, oldest):
                if not await store.carry(users, at, to):
                    raise _another()
                at = to
                self.carried += count
            await carry_given_up(self._redis, partition, self._live, self._live + 1)
        if at is None and not await store.carry({}, at, to):
            raise _another()
        return to


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
        state = await stream_of(self._broker, stream)
        if state.epoch != checkpoint.epoch:
            raise TopologyError(
                f"unread was folded from another incarnation of {stream}", "Run `seamark rebuild unread`."
            )
        at = await self._advance(users, stream, subject, at, checkpoint.seq)
        names = await self._names(p, users)
        for start in range(0, len(names), USERS_MAX):
            part, now = names[start : start + USERS_MAX], time.time()
            counts = await reader.read(p, part, now)
            if counts.checkpoint is None or counts.checkpoint.epoch != state.epoch:
                raise TopologyError("Redis has lost its counts meanwhile", "Run it again.")
            at = await self._advance(users, stream, subject, at, counts.checkpoint.seq)
            for user, stored in zip(part, counts.users, strict=True):
                expected = users[user].count(round(now * 1000)) if user in users else NONE_UNREAD
                if stored != expected and await self._is_older(p, user, state):
                    self.result.not_verifiable += 1
                    continue
                self.result.compared += 1
                if stored != expected:
                    yield Difference("unread", user.split("."), stored=stored, expected=expected)

    async def _names(self, p: int, users: dict[str, UserFold]) -> list[str]:
        """Whom the log knows, and of whom else something is stored."""
        prefix = f"{meta_key(p, await read_version(self._redis)).removesuffix('meta')}s:"
        found = dict.fromkeys(users)
        async for keys in scanned(self._redis, f"{prefix}*"):
            found.update(dict.fromkeys(key.decode().removeprefix(prefix) for key in keys))
        return list(found)

    async def _is_older(self, p: int, user: str, state: StreamState) -> bool:
        """Whether something counts, or was given up, that the log has lost."""
        if state.first_seq <= 1:
            return False
        prefix = meta_key(p, await read_version(self._redis)).removesuffix("meta")
        older = await asked(self._redis.zcount(f"{prefix}s:{user}", "-inf", f"({state.first_seq}"))
        return bool(older or await asked(self._redis.hexists(f"{prefix}d:{user}", "m")))

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


def _another() -> TopologyError:
    return TopologyError("another rebuild has begun", "Run one rebuild of a projection at a time.")
