"""Reads unread counts: checkpoint, freshness and the counts of many users in one script, so that they belong together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
from redis.asyncio import Redis

from engine.redisscript import RedisScript
from projections.folds.unread import Unread
from projections.store import Checkpoint
from projections.unread.frames import count_for_clients
from projections.unread.script import READ
from projections.unread.store import FIRST_VERSION, VERSION_SECONDS, asked, meta_key, read_version, unread_of
from seamark.protocol import frames
from seamark.protocol.cursor import parse_cursor

USERS_MAX: Final = 256
"""Users of one script: below a millisecond of Redis's time."""

STALE_SECONDS: Final = 10.0
"""A projector tells every two seconds that it is up to date, and a standby takes over within ten."""


class Counts(NamedTuple):
    """Counts of some users of a partition, all of one moment.

    Attributes:
        checkpoint: the fold has come so far; None when there is none (Redis is empty): then there are no counts.
        stale: records that were stored some time ago may not be counted.
        age_seconds: all that was stored so long ago is counted.
        users: what is unread, in the order asked.
    """

    checkpoint: Checkpoint | None
    stale: bool
    users: list[Unread]
    age_seconds: float = 0.0


class UnreadCount(msgspec.Struct, frozen=True):
    """A user's unread notifications, as others may know them.

    Attributes:
        count: exact; with `more`, that of the newest, and a lower bound of all.
        by_category: of those that have a category.
        as_of: the records up to this position are counted.
        stale: records beyond it may have been stored some time ago.
    """

    count: int
    by_category: dict[str, int]
    as_of: Checkpoint
    stale: bool
    more: bool


def shown(unread: UnreadCount, *, stale: bool = False) -> frames.Unread:
    """The count as a client is told it."""
    return count_for_clients(unread, unread.as_of.seq, stale=unread.stale or stale)


class UnreadReader:
    """Reads the live version. A switch to another is noticed within a second."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._read = RedisScript(redis, READ)
        self._version = FIRST_VERSION
        self._version_until = 0.0
        self._uncounted: set[int] = set()

    async def read(self, partition: int, users: Sequence[str], now: float | None = None) -> Counts:
        """What is unread of `users` (`<tenant>.<user>`, as tokens; at most 256) at the Unix time `now`.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        believed = time.monotonic() < self._version_until
        counts = await self._read_version(partition, users, now)
        if counts.checkpoint is None and believed and partition not in self._uncounted:
            self._version_until = 0.0  # a switch, and the former version has been dropped
            counts = await self._read_version(partition, users, now)
        if counts.checkpoint is None:
            self._uncounted.add(partition)  # no version has anything, so one question is enough from now on
        else:
            self._uncounted.discard(partition)
        return counts

    async def unread_of(self, partition: int, users: Sequence[str]) -> list[UnreadCount]:
        """The same for whoever shows them; empty when nothing is known (Redis is empty)."""
        at, stale, counts, _ = await self.read(partition, users)
        return [] if at is None else [UnreadCount(one.count, one.by_category, at, stale, one.more) for one in counts]

    async def close(self) -> None:
        """Drop the connection."""
        await self._read.close()

    async def _read_version(self, partition: int, users: Sequence[str], now: float | None) -> Counts:
        if time.monotonic() >= self._version_until:
            self._version = await read_version(self._redis)
            self._version_until = time.monotonic() + VERSION_SECONDS
        at = round((time.time() if now is None else now) * 1000)
        answer = await asked(self._read([meta_key(partition, self._version)], [at, *users]))
        if not answer:
            return Counts(None, stale=True, users=[])
        checkpoint = Checkpoint(*parse_cursor(answer[0].decode()))
        age_seconds = answer[2] / 1000
        found = [unread_of(count, more, words) for _, count, more, words in answer[3:]]
        return Counts(checkpoint, bool(answer[1]) or age_seconds > STALE_SECONDS, found, age_seconds)
