"""The unread counts of a partition in Redis: sets, counts and checkpoint are changed by one script or not at all.

Whatever asks Redis raises StoreUnavailable when there is no answer in time: the outcome is unknown, ask again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from redis.asyncio import Redis

from engine.dispatch.claims import AWAY
from engine.outages import redis_failure
from engine.partition.reader import Delivered
from engine.redisscript import Argument, RedisScript
from projections import metrics
from projections.folds.changes import NEVER_SHOWN, NO_RECORD, Change, clean, decode_change
from projections.folds.repeats import REMEMBERED_MAX
from projections.folds.unread import FOR_EVER, UNREAD_MAX, Unread, milliseconds
from projections.store import Checkpoint
from projections.unread.script import APPLY, ATTEND
from seamark.protocol.cursor import parse_cursor

REDIS_SECONDS: Final = 2.0
"""A script of a batch takes some milliseconds; after this long the outcome is unknown, and the checkpoint tells."""

WEIGHT_MAX: Final = 1000
"""Work of one script, in operations: while it runs, Redis serves nobody else."""

CLEAR_WEIGHT: Final = 20
"""A `read` up to a sequence may take a thousand ids off one by one; most take all there are at once."""

USERS_AT_A_TIME: Final = WEIGHT_MAX // CLEAR_WEIGHT

DUE_USERS_MAX: Final = 256

VERSION_KEY: Final = "unread:version"
"""Which version readers read; a rebuild makes the next one beside it and then moves this."""

FIRST_VERSION: Final = 1

VERSION_SECONDS: Final = 1.0
"""How long a version is believed in: writing a little longer to one that is no longer read does no harm."""


class Counted(NamedTuple):
    """A user (`<tenant>.<user>`, as tokens) and what is unread."""

    user: str
    unread: Unread


class Applied(NamedTuple):
    """What a batch has changed: who was `touched`. `users` is empty while catching up, and where the answer was lost."""

    seq: int
    users: list[Counted]
    touched: list[str]


_pack = msgspec.msgpack.Encoder().encode
_unpack: Callable[[bytes], list[tuple[str, int, int, list[str]]]] = msgspec.msgpack.Decoder(
    list[tuple[str, int, int, list[str]]]
).decode
_NOTHING: Final = _pack([])


def key_prefix(partition: int, version: int) -> str:
    """What all keys of a partition begin with."""
    return f"unread:{{{partition}:{version}}}:"


def meta_key(partition: int, version: int) -> str:
    """The key of a partition's checkpoint."""
    return f"{key_prefix(partition, version)}meta"


async def read_version(redis: Redis) -> int:
    """The version readers read."""
    value = await asked(redis.get(VERSION_KEY))
    return int(value) if value is not None else FIRST_VERSION


async def write_version(redis: Redis, version: int) -> None:
    """Switch readers and projectors to `version`, at once."""
    await asked(redis.set(VERSION_KEY, version))


async def drop_version(redis: Redis, partition: int, version: int) -> None:
    """Forget all keys of a partition's version, a few hundred at a time."""
    # The checkpoint goes first: without it nobody who still believes in this version takes half of it for counts, or writes.
    await asked(redis.unlink(meta_key(partition, version)))
    async for keys in scanned(redis, f"{key_prefix(partition, version)}*"):
        await asked(redis.unlink(*keys))


async def scanned(redis: Redis, pattern: str) -> AsyncIterator[list[bytes]]:
    """The keys that match, a few hundred at a time."""
    cursor = 0
    while True:
        cursor, keys = await asked(redis.scan(cursor, match=pattern, count=500))
        if keys:
            yield keys
        if not cursor:
            return


async def users_of(redis: Redis, partition: int, version: int, kind: str) -> AsyncIterator[list[str]]:
    """Users who have a key of this kind (see `projections.unread.script`), as many as one script can do much for."""
    prefix = f"{key_prefix(partition, version)}{kind}:"
    async for keys in scanned(redis, f"{prefix}*"):
        users = [key.decode().removeprefix(prefix) for key in keys]
        for start in range(0, len(users), USERS_AT_A_TIME):
            yield users[start : start + USERS_AT_A_TIME]


class UnreadStore:
    """A `projections.store.Store` of one partition.

    Args:
        version: a fixed version, for a rebuild; None: whichever is live, asked at every checkpoint.
        applied: told what a batch has changed, once it is stored.
        bound: unread notifications remembered for each user.
        remembered: notifications of each user, read or not, whose ids are known when they come again.
    """

    def __init__(
        self,
        redis: Redis,
        partition: int,
        *,
        version: int | None = None,
        applied: Callable[[Applied], None] | None = None,
        bound: int = UNREAD_MAX,
        remembered: int = REMEMBERED_MAX,
    ) -> None:
        self._redis = redis
        self._partition = partition
        self._fixed = version
        self._version = version or FIRST_VERSION
        self._version_at = 0.0
        self._applied = applied
        self._bound = bound
        self._remembered = remembered
        self._apply = RedisScript(redis, APPLY)
        self._attend = RedisScript(redis, ATTEND)
        self.until = 0
        self.reached: Checkpoint | None = None
        self._unanswered: Applied | None = None

    async def checkpoint(self) -> Checkpoint | None:
        """The stored checkpoint of the live version."""
        if self._fixed is None:
            self._version, self._version_at = await read_version(self._redis), time.monotonic()
        value = await asked(self._redis.hget(self._meta, "checkpoint"))
        self.reached = None if value is None else Checkpoint(*parse_cursor(value.decode()))
        unanswered, self._unanswered = self._unanswered, None
        if unanswered and self._applied and self.reached is not None and self.reached.seq == unanswered.seq:
            self._applied(unanswered)
        return self.reached

    async def superseded(self) -> bool:
        """Whether another version has been switched to: its checkpoint counts now."""
        if self._fixed is None and await read_version(self._redis) != self._version:
            return True
        self._version_at = time.monotonic()
        return False

    @property
    def version(self) -> int:
        """Which version was live when the checkpoint was read; or the fixed one."""
        return self._version

    @property
    def _meta(self) -> str:
        return meta_key(self._partition, self._version)

    @property
    def catching_up(self) -> bool:
        """Whether the fold has not yet come to what the log held when this projector took over (`until`)."""
        return self.reached is None or self.reached.seq < self.until

    async def apply(self, batch: Sequence[Delivered], expected: Checkpoint | None, reached: Checkpoint) -> bool:
        """Fold `batch` in; in several scripts, each with its checkpoint, where one would keep Redis for too long."""
        if time.monotonic() - self._version_at > VERSION_SECONDS and await self.superseded():
            return False
        start, at = 0, expected
        while start < len(batch):
            users, stop = gather(batch, start)
            to = Checkpoint(reached.epoch, batch[stop - 1].seq)
            if not await self._script(users, batch[stop - 1], at, to):
                return False
            start, at = stop, to
        return True

    async def _script(
        self, users: dict[str, list[Any]], newest: Delivered, expected: Checkpoint | None, to: Checkpoint
    ) -> bool:
        now = round(time.time() * 1000)
        quiet = to.seq < self.until or self._applied is None
        # Until it is answered: its effect may show, but the counts it gives are lost then.
        self._unanswered = Applied(to.seq, [], list(users))
        age = max(0, now - newest.time_nanoseconds // 1_000_000)
        answer = await self._run(users, expected, to, until=self.until, age=age, now=0 if quiet else now)
        if answer is None:
            return False
        self.reached, self._unanswered = to, None
        if self._applied is not None:
            self._applied(Applied(to.seq, _counts(answer), list(users)))
        return True

    async def _run(
        self,
        users: dict[str, list[Any]],
        expected: Checkpoint | None,
        to: Checkpoint,
        *,
        until: int = 0,
        age: int = 0,
        now: int = 0,
    ) -> Any:
        """Run the script that does operations and moves the checkpoint; None where another one is stored than `expected`."""
        packed = _packed(users)
        args = (_text(expected), _text(to), to.seq, until, age, now, self._bound, packed, self._remembered)
        return await asked(self._apply([self._meta], args))

    async def attend(
        self, checkpoint: Checkpoint, *, complete: bool, age_seconds: float | None, now: float
    ) -> list[Counted] | None:
        """Note how fresh the counts are, and say of which users something has expired since the last time.

        Args:
            checkpoint: what the stored one must be; else nothing is done and None returned.
            complete: all there is in the log is counted.
            age_seconds: all that was stored so long ago is counted; None: not known.
            now: Unix time.
        """
        age = -1 if age_seconds is None else max(0, round(age_seconds * 1000))
        args: list[Argument] = [_text(checkpoint), int(complete), age, round(now * 1000), DUE_USERS_MAX]
        answer = await asked(self._attend([self._meta], args))
        if answer is None:
            return None
        if complete:
            self.until = 0
        return _counts(answer)

    async def close(self) -> None:
        """Drop the connections."""
        await self._apply.close()
        await self._attend.close()

    async def begin(self, checkpoint: Checkpoint) -> bool:
        """Store the first checkpoint of a log that holds no record. False: there is one already."""
        return await self.carry({}, None, checkpoint)

    async def carry(self, users: dict[str, list[Any]], expected: Checkpoint | None, checkpoint: Checkpoint) -> bool:
        """Take operations over as they are, and store where the log begins behind them. False: as of `apply`."""
        if await self._run(users, expected, checkpoint) is None:
            return False
        self.reached = checkpoint
        return True

    async def forget(self, users: dict[str, list[Any]]) -> bool:
        """Do operations that follow from no record (`projections.retention.counts`). False: the checkpoint moved, ask again."""
        stored, until, fresh = await asked(self._redis.hmget(self._meta, "checkpoint", "until", "fresh"))
        if stored is None:
            return True  # nothing counts
        seconds, micros = await asked(self._redis.time())
        age = max(0, seconds * 1000 + micros // 1000 - int(fresh or 0))
        at = Checkpoint(*parse_cursor(stored.decode()))
        return await self._run(users, at, at, until=int(until or 0), age=age) is not None


def gather(batch: Sequence[Delivered], start: int = 0) -> tuple[dict[str, list[Any]], int]:
    """The operations of a batch from `start` on, by user in the order of the log, and where the next script begins."""
    users: dict[str, list[Any]] = {}
    weight = 0
    for index in range(start, len(batch)):
        record = batch[index]
        try:
            # log.<p>.<tenant>.<user>; the broker takes any bytes for a token
            user = record.subject.decode().split(".", 2)[2]
            change = decode_change(record.payload)
        except NO_RECORD:
            metrics.projection_skipped.labels("unread").inc()
            continue
        ops = users.get(user)
        if ops is None:
            ops = users[user] = []
        if change.kind == "notification":
            id = clean(change.id)
            weight += 1
            if NEVER_SHOWN in record.headers:
                ops += (6, record.seq, id)
                continue
            at = record.time_nanoseconds // 1_000_000
            if change.collapse_key or change.expires_at:
                expires = min(FOR_EVER, milliseconds(change.expires_at)) if change.expires_at else FOR_EVER
                key = clean(change.collapse_key or "")
                ops += (3, at, record.seq, id, clean(change.category or ""), key, expires)
            elif change.category:
                ops += (2, at, record.seq, id, clean(change.category))
            else:
                ops += (1, at, record.seq, id)
        else:
            weight += _removals(ops, change)
        if weight >= WEIGHT_MAX:
            return users, index + 1
    return users, len(batch)


def _removals(ops: list[Any], change: Change) -> int:
    """What a read, archive or recall takes off; its weight."""
    if change.kind not in ("read", "archive", "recall"):
        return 0
    for id in change.ids:
        ops += (4, clean(id))
    if change.up_to is None or change.kind == "recall":
        return len(change.ids)
    if change.up_to <= 0:
        return len(change.ids)  # below it stands what was taken over from a former incarnation of the log
    ops += (5, min(change.up_to, FOR_EVER))
    return len(change.ids) + CLEAR_WEIGHT


def _packed(users: dict[str, list[Any]]) -> bytes:
    """One flat list: it costs Lua one table, and Redis one argument."""
    values: list[Any] = []
    for user, ops in users.items():
        values.append(user)
        values.append(len(ops))
        values += ops
    return _pack(values) if values else _NOTHING


def unread_of(count: int, more: int, categories: Sequence[str | bytes]) -> Unread:
    """A script's answer for one user; `categories` holds names and counts in turn."""
    words = [word.decode() if isinstance(word, bytes) else word for word in categories]
    pairs = zip(words[::2], map(int, words[1::2]), strict=True)
    return Unread(count, {name: n for name, n in pairs if n > 0} if words else {}, more=bool(more))


def _counts(answer: bytes) -> list[Counted]:
    if answer == _NOTHING:
        return []
    return [Counted(user, unread_of(count, more, words)) for user, count, more, words in _unpack(answer)]


def _text(checkpoint: Checkpoint | None) -> str:
    return "" if checkpoint is None else f"{checkpoint.epoch}.{checkpoint.seq}"


async def asked(question: Any) -> Any:
    """The answer, within a deadline."""
    try:
        async with asyncio.timeout(REDIS_SECONDS):
            return await question
    except AWAY as error:
        raise redis_failure(error) from error
