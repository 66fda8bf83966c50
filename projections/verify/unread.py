"""Verifies the unread counts: each against the fold of its user's log, and against the list that the inbox shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.errors import StoreBroken
from engine.partition.reader import Delivered
from engine.patience import patiently
from engine.postgres import LOOK_SECONDS, Pool, asking
from projections.folds.repeats import Remembered
from projections.folds.unread import Unread, UserFold
from projections.inbox.queries import SHOWN_AT, UNREAD
from projections.postgres.versions import Place, live, live_version, read_place
from projections.projection import INBOX
from projections.projection import UNREAD as COUNTS
from projections.replay import Progress, no_progress
from projections.store import Checkpoint
from projections.unread.carry import remembered_before
from projections.unread.reader import USERS_MAX, UnreadReader
from projections.unread.store import asked, key_prefix, read_version, users_of
from projections.verify import inbox
from projections.verify.scan import scan
from projections.verify.spill import Spill, Users
from projections.verify.streams import (
    Difference,
    Judgement,
    Part,
    StreamVerification,
    is_user,
    names_of,
    tokens_of,
)

LOOKS: Final = 20
"""How often a user for whom records keep coming is compared, until count and list are of the same records."""

LOOK_AGAIN_SECONDS: Final = 0.1

_LISTED: Final = f"""
SELECT o.tenant, o.user_id, (
    SELECT count(*) FROM inbox i WHERE i.version = {live("inbox")}
        AND i.tenant = o.tenant AND i.user_id = o.user_id AND {UNREAD} AND {SHOWN_AT.format(now="$3::timestamptz")}
) AS unread
FROM unnest($1::text[], $2::text[]) AS o (tenant, user_id)
"""


class UnreadVerification(StreamVerification):
    """Of the counts in Redis.

    Args:
        pool: the database with the inbox; None: counts are compared with the logs only.
    """

    projection = COUNTS

    def __init__(
        self,
        broker: Broker,
        redis: Redis,
        partitions: int,
        *,
        pool: Pool | None = None,
        progress: Progress = no_progress,
    ) -> None:
        super().__init__(broker, partitions, progress)
        self._redis = redis
        self._pool = pool
        self._reader = UnreadReader(redis)

    async def _close(self) -> None:
        await self._reader.close()

    def _light(self, stored: Delivered) -> Delivered | None:
        return inbox.light(stored)

    async def _place(self, p: int) -> Place | None:
        at = (await self._reader.read(p, [])).checkpoint
        return None if at is None else Place(at, era=1)

    async def _read_stored(self, spill: Spill) -> None:
        """Add the users who have something stored, in Redis or in the inbox. The counts are read when they are compared."""
        for p in self._parts:
            async for users in users_of(self._redis, p, await patiently(read_version, self._redis), "s"):
                for user in filter(is_user, users):
                    spill.stored(user)
        if self._pool is not None:
            where = f"{UNREAD} AND {SHOWN_AT.format(now='now()')}"
            columns = "DISTINCT tenant, user_id"
            async for rows in scan(self._pool, INBOX.name, "inbox", columns, self._progress, where):
                for row in rows:
                    spill.stored(tokens_of(row["tenant"], row["user_id"]))

    async def _suspects(self, users: Users) -> list[str]:
        suspects = []
        by_partition: dict[int, list[str]] = {}
        for user in users:
            by_partition.setdefault(self.partition(user), []).append(user)
        for p in by_partition.keys() & self._parts.keys():
            for start in range(0, len(by_partition[p]), USERS_MAX):
                page, now = by_partition[p][start : start + USERS_MAX], time.time()
                _, counts = await patiently(self._counts, p, page, now)
                listed = await patiently(self._listed, page, now)
                for user, stored in zip(page, counts, strict=True):
                    said = [Delivered(*one) for one in users[user][0]]
                    expected = _folded(UserFold(), said).count(round(now * 1000))
                    if stored != expected or not agree(stored, listed.get(user)):
                        suspects.append(user)
                    else:
                        self.result.compared += 1
        return suspects

    async def _counts(self, p: int, users: Sequence[str], now: float) -> tuple[Checkpoint, list[Unread]]:
        counts = await self._reader.read(p, users, now)
        if counts.checkpoint is None:
            raise StoreBroken("Redis has lost its counts meanwhile: run the verification again")
        return counts.checkpoint, counts.users

    async def _listed(self, users: Sequence[str], now: float) -> dict[str, int]:
        """How many notifications the inbox lists as unread, by user; empty where there is no inbox."""
        if self._pool is None:
            return {}
        columns = list(zip(*map(names_of, users), strict=True))
        async with asking(self._pool, LOOK_SECONDS) as connection:
            rows = await connection.fetch(_LISTED, *map(list, columns), datetime.fromtimestamp(now, UTC))
        return {tokens_of(row["tenant"], row["user_id"]): row["unread"] for row in rows}

    async def _look(self, user: str) -> Judgement:
        p, now = self.partition(user), time.time()
        checkpoint, [stored] = await self._counts(p, [user], now)
        part = await self._part(p, Place(checkpoint, era=1))
        version = await read_version(self._redis)
        prefix = key_prefix(p, version)
        before = await remembered_before(self._redis, p, version, user, part.oldest)
        since = {mark: newer for newer, mark in enumerate(reversed(before))}
        fold = _folded(UserFold(remembered=Remembered(since)), await self._said(user, part))
        expected = fold.count(round(now * 1000))
        disagreements = await self._disagreements(user, part)
        if stored == expected:
            return Judgement(disagreements, 1)
        if await self._is_older(prefix, user, part.oldest):
            return Judgement(disagreements, 0, 1)
        return Judgement([Difference("unread", user.split("."), stored=stored, expected=expected), *disagreements], 1)

    async def _is_older(self, prefix: str, user: str, oldest: int) -> bool:
        """Whether a notification counts, or was given up, whose record the log no longer holds."""
        older = await asked(self._redis.zcount(f"{prefix}s:{user}", "-inf", f"({oldest}"))
        given_up = oldest > 1 and await asked(self._redis.hexists(f"{prefix}d:{user}", "m"))
        return bool(older or given_up)

    async def _disagreements(self, user: str, part: Part) -> list[Difference]:
        """Compare the count with the list once both are of the same records: each projection folds at its own pace."""
        if self._pool is None:
            return []
        stream = self.projection.stream(part.number)
        for _ in range(LOOKS):
            now = time.time()
            # Asked before the list: a position read after it may be that of records which the list did not hold yet.
            before, version = await self._inbox_place(part)
            listed = (await self._listed([user], now))[user]
            checkpoint, [stored] = await self._counts(part.number, [user], now)
            _, after = await self._inbox_place(part)
            newest = await self._broker.leader_last(stream, f"{self.projection.kind}.{part.number}.{user}")
            if agree(stored, listed):
                return []
            if before is not None and version == after and before.checkpoint.epoch == checkpoint.epoch:
                both = min(before.checkpoint.seq, checkpoint.seq)
                if newest is None or newest.seq <= both:
                    what = "unread count and inbox disagree"
                    return [Difference(what, user.split("."), stored=stored, expected=listed)]
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
        self.result.not_verifiable += 1
        return []

    async def _inbox_place(self, part: Part) -> tuple[Place | None, int]:
        """The checkpoint and the live version of the inbox."""
        assert self._pool is not None
        async with asking(self._pool, LOOK_SECONDS) as connection:
            place = await read_place(connection, INBOX.name, INBOX.stream(part.number), part.number)
            return place, await live_version(connection, INBOX.name)


def agree(unread: Unread, listed: int | None) -> bool:
    """Whether a count and the length of a list can be of the same log; None: there is no list."""
    return listed is None or (unread.count <= listed if unread.more else unread.count == listed)


def _folded(fold: UserFold, said: Sequence[Delivered]) -> UserFold:
    for one in said:
        _, entry = inbox.record_of(one)
        fold.apply(msgspec.structs.replace(one, payload=entry))
    return fold
