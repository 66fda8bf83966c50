"""What a version of the unread counts remembers of records that the log has lost: read for the version that follows it.

As in `projections.unread.store`, StoreUnavailable is raised when Redis does not answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from redis.asyncio import Redis

from projections.folds.repeats import fingerprint
from projections.unread.store import WEIGHT_MAX, asked, key_prefix, users_of

_details = msgspec.msgpack.Decoder(tuple[str, str, int]).decode

Operations = dict[str, list[Any]]
"""By user, as `projections.unread.store.gather` gives them."""


async def carried(
    redis: Redis, partition: int, version: int, oldest: int, shift: int = 0
) -> AsyncIterator[tuple[Operations, int]]:
    """What is known of records before `oldest`, as operations for scripts that make it known again; how many of them count.

    Args:
        shift: taken from every sequence: what a former incarnation of the log held comes before all that this one holds.
    """
    base = key_prefix(partition, version)
    async for page in users_of(redis, partition, version, "s"):
        pipeline = redis.pipeline(transaction=False)
        for user in page:
            pipeline.zrangebyscore(f"{base}s:{user}", "-inf", f"({oldest}", withscores=True)
            pipeline.hgetall(f"{base}d:{user}")
        answers = iter(await asked(pipeline.execute()))
        users: Operations = {}
        weight = 0
        for user, ids, details in zip(page, answers, answers, strict=True):
            users[user] = [word for id, seq in ids for word in _operation(id, int(seq) - shift, details)]
            weight += len(ids)
            if weight >= WEIGHT_MAX:
                yield users, weight
                users, weight = {}, 0
        if weight:
            yield users, weight
    # Afterwards: one that counts would be taken for a repetition of what is remembered.
    async for page in users_of(redis, partition, version, "r"):
        pipeline = redis.pipeline(transaction=False)
        for user in page:
            pipeline.hgetall(f"{base}r:{user}")
        users = {}
        for user, entries in zip(page, await asked(pipeline.execute()), strict=True):
            noted = sorted((int(seq), mark) for mark, seq in entries.items() if int(seq) < oldest)
            users[user] = [word for seq, mark in noted for word in (9, mark.decode(), seq - shift)]
        yield {user: ops for user, ops in users.items() if ops}, 0


async def remembered_before(redis: Redis, partition: int, version: int, user: str, oldest: int) -> list[str]:
    """The fingerprints of a user's remembered notifications that were stored before `oldest`, the newest last."""
    base = key_prefix(partition, version)
    pipeline = redis.pipeline(transaction=False)
    pipeline.zrangebyscore(f"{base}s:{user}", "-inf", f"({oldest}", withscores=True)
    pipeline.hgetall(f"{base}r:{user}")
    counting, others = await asked(pipeline.execute())
    noted = {fingerprint(id.decode()): int(seq) for id, seq in counting}
    noted |= {mark.decode(): int(seq) for mark, seq in others.items() if int(seq) < oldest}
    return sorted(noted, key=lambda mark: noted[mark])


def _operation(id: bytes, seq: int, of_user: dict[bytes, bytes]) -> tuple[Any, ...]:
    details = of_user.get(b"i" + id)
    if details is None:
        return (1, 0, seq, id.decode())
    if details.startswith(b"c"):
        return (2, 0, seq, id.decode(), details[1:].decode())
    return (3, 0, seq, id.decode(), *_details(details[1:]))


async def carry_given_up(redis: Redis, partition: int, version: int, following: int, shift: int = 0) -> None:
    """That some were given up above the bound, or a count that is a lower bound would be taken for an exact one."""
    base, new = key_prefix(partition, version), key_prefix(partition, following)
    async for page in users_of(redis, partition, version, "d"):
        pipeline = redis.pipeline(transaction=False)
        for user in page:
            pipeline.hget(f"{base}d:{user}", "m")
        for user, given_up in zip(page, await asked(pipeline.execute()), strict=True):
            if given_up is not None:
                seq, _, until = given_up.decode().partition(",")
                await asked(redis.hset(f"{new}d:{user}", "m", f"{int(seq) - shift},{until}"))
