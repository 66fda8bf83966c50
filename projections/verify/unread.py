"""Verifies the unread counts: each against the fold of its user's log, and against the list that the inbox shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.partition.reader import Delivered
from projections.folds.changes import NEVER_SHOWN, decode_change
from projections.folds.repeats import Remembered
from projections.folds.unread import Unread, UserFold
from projections.inbox.queries import SHOWN_AT, UNREAD
from projections.inbox.table import INBOX
from projections.postgres.patience import patiently
from projections.postgres.versions import asking
from projections.store import Checkpoint, StoreBroken
from projections.unread.carry import remembered_before
from projections.unread.reader import USERS_MAX, UnreadReader
from projections.unread.store import asked, key_prefix, read_version, scanned
from projections.verify.spill import Spill, Users
from projections.verify.streams import (
    LIVE,
    LOOK_SECONDS,
    Difference,
    Judgement,
    Part,
    Progress,
    StreamVerification,
    Tables,
    checkpoint_of,
    names_of,
    tokens_of,
)
from seamark.protocol.subjects import log_stream

if TYPE_CHECKING:
    from projections.postgres.versions import Pool

LOOKS: Final = 20
"""How often a user for whom records keep coming is compared, until count and list are of the same records."""

LOOK_AGAIN_SECONDS: Final = 0.1

_LISTED: Final = f"""
SELECT o.tenant, o.user_id, (
    SELECT count(*) FROM inbox i WHERE i.version = {LIVE.format(INBOX)}
        AND i.tenant = o.tenant AND i.user_id = o.user_id AND {UNREAD} AND {SHOWN_AT.format(now="$3::timestamptz")}
) AS unread
FROM unnest($1::text[], $2::text[]) AS o (tenant, user_id)
"""


class _Light(msgspec.Struct, array_like=True):
    seq: int
    stored_ms: int
    never_shown: bool
    payload: bytes


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(_Light).decode


class UnreadVerification(StreamVerification):
    """Of the counts in Redis.

    Args:
        pool: the database with the inbox; None: counts are compared with the logs only.
    """

    projection = "unread"
    kind = "log"

    def __init__(
        self,
        broker: Broker,
        redis: Redis,
        partitions: int,
        *,
        pool: Pool | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(broker, partitions, progress)
        self._redis = redis
        self._pool = pool
        self._reader = UnreadReader(redis)

    async def _close(self) -> None:
        await self._reader.close()

    def _stream(self, p: int) -> str:
        return log_stream(p)

    async def _checkpoint(self, p: int) -> Checkpoint | None:
        return (await self._reader.read(p, [])).checkpoint

    def _light(self, stored: Delivered) -> bytes | None:
        try:
            payload = msgspec.json.encode(decode_change(stored.payload))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        never_shown = NEVER_SHOWN in stored.headers
        return _pack(_Light(stored.seq, stored.time_nanoseconds // 1_000_000, never_shown, payload))

    async def _read_stored(self, spill: Spill) -> None:
        """Add the users who have something stored, in Redis or in the inbox. The counts are read when they are compared."""
        for p in self._parts:
            prefix = f"{key_prefix(p, await patiently(lambda: read_version(self._redis)))}s:"
            async for keys in scanned(self._redis, f"{prefix}*"):
                for key in keys:
                    spill.stored(key.decode().removeprefix(prefix))
        if self._pool is not None:
            where = f"{UNREAD} AND {SHOWN_AT.format(now='now()')}"
            columns = "DISTINCT tenant, user_id"
            async for rows in Tables(self._pool, INBOX, self._progress).rows("inbox", columns, where):
                for row in rows:
                    spill.stored(tokens_of(row["tenant"], row["user_id"]))

    async def _compare(self, users: Users) -> list[str]:
        suspects = []
        by_partition: dict[int, list[str]] = {}
        for user in users:
            by_partition.setdefault(self.partition(user), []).append(user)
        for p, names in by_partition.items():
            if p not in self._parts:
                continue
            for start in range(0, len(names), USERS_MAX):
                page, now = names[start : start + USERS_MAX], time.time()
                counts = await patiently(lambda p=p, page=page, now=now: self._counts(p, page, now))  # type: ignore[misc]
                listed = await patiently(lambda page=page, now=now: self._listed(page, now))  # type: ignore[misc]
                for user, stored in zip(page, counts[1], strict=True):
                    expected = _folded(UserFold(), users[user][0]).count(round(now * 1000))
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

    def _judge(self, user: str, part: Part, said: Sequence[bytes], stored: Sequence[bytes]) -> Judgement:
        raise NotImplementedError("counts are asked for many users at a time")

    async def _look(self, user: str) -> Judgement:
        part = self._parts[self.partition(user)]
        first = await self._broker.leader_next(part.stream, f"log.{part.number}.>", 1)
        now = time.time()
        checkpoint, [stored] = await self._counts(part.number, [user], now)
        await self._check_epoch(part.stream, checkpoint)
        oldest = first.seq if first is not None else checkpoint.seq + 1
        prefix = key_prefix(part.number, await read_version(self._redis))
        before = remembered_before(await asked(self._redis.hgetall(f"{prefix}r:{user}")), oldest)
        since = {mark: newer for newer, (_, mark) in enumerate(reversed(before))}
        fold = _folded(UserFold(remembered=Remembered(since)), await self._said(user, part, checkpoint.seq))
        differences = []
        expected = fold.count(round(now * 1000))
        if stored != expected:
            if await self._is_older(prefix, user, oldest):
                return Judgement(await self._disagreements(user, part), 0, 1)
            differences.append(Difference("unread", user.split("."), stored=stored, expected=expected))
        return Judgement(differences + await self._disagreements(user, part), 1)

    async def _is_older(self, prefix: str, user: str, oldest: int) -> bool:
        """Whether a notification counts, or was given up, whose record the log no longer holds."""
        older = await asked(self._redis.zcount(f"{prefix}s:{user}", "-inf", f"({oldest}"))
        given_up = oldest > 1 and await asked(self._redis.hexists(f"{prefix}d:{user}", "m"))
        return bool(older or given_up)

    async def _disagreements(self, user: str, part: Part) -> list[Difference]:
        """Compare the count with the list once both are of the same records: each projection folds at its own pace."""
        if self._pool is None:
            return []
        for _ in range(LOOKS):
            now = time.time()
            # Asked before the list: a position read after it may be that of records which the list did not hold yet.
            at, before = await self._positions(part)
            listed = (await self._listed([user], now))[user]
            checkpoint, [stored] = await self._counts(part.number, [user], now)
            _, after = await self._positions(part)
            newest = await self._broker.leader_last(part.stream, f"log.{part.number}.{user}")
            if agree(stored, listed):
                return []
            both = before == after and at is not None and at.epoch == checkpoint.epoch
            if both and at is not None and (newest is None or newest.seq <= min(at.seq, checkpoint.seq)):
                return [Difference("unread count and inbox disagree", user.split("."), stored=stored, expected=listed)]
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
        self.result.not_verifiable += 1
        return []

    async def _positions(self, part: Part) -> tuple[Checkpoint | None, int]:
        """The checkpoint and the live version of the inbox."""
        assert self._pool is not None
        async with asking(self._pool, LOOK_SECONDS) as connection:
            at = await checkpoint_of(connection, INBOX, part.stream, part.number)
            version = await connection.fetchval(f"SELECT {LIVE.format(INBOX)}")
        return (at[0] if at is not None else None), version


def agree(unread: Unread, listed: int | None) -> bool:
    """Whether a count and the length of a list can be of the same log; None: there is no list."""
    return listed is None or (unread.count <= listed if unread.more else unread.count == listed)


def _folded(fold: UserFold, said: Sequence[bytes]) -> UserFold:
    for light in map(_unpack, said):
        fold.apply(light.seq, light.stored_ms, NEVER_SHOWN if light.never_shown else b"", light.payload)
    return fold
