"""What a version of the unread counts remembers of records that the log has lost: read for the version that follows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from projections.unread.store import WEIGHT_MAX, asked, key_prefix, scanned

USERS_AT_A_TIME: Final = 20
"""Each may have a thousand ids."""

_details = msgspec.msgpack.Decoder(tuple[str, str, int]).decode

Operations = dict[str, list[Any]]
"""By user, as `projections.unread.store.gather` gives them."""


async def carried(
    redis: Redis, partition: int, version: int, oldest: int, shift: int = 0
) -> AsyncIterator[tuple[Operations, int]]:
    """What is known of records before `oldest`, as operations for scripts that make it known again; how many of them count.

    Args:
        shift: taken from every sequence: what a former incarnation of the log held comes before all that this one holds.

    Raises:
        StoreUnavailable: Redis does not answer.
    """
    base = key_prefix(partition, version)
    async for users in _remembered(redis, base, oldest, shift):
        yield users, 0
    users = {}
    weight = 0
    async for keys in scanned(redis, f"{base}s:*"):
        names = [key.decode().removeprefix(f"{base}s:") for key in keys]
        for start in range(0, len(names), USERS_AT_A_TIME):
            async for user, ids, ops in _older(redis, base, names[start : start + USERS_AT_A_TIME], oldest, shift):
                users[user] = ops
                weight += ids
                if weight >= WEIGHT_MAX:
                    yield users, weight
                    users, weight = {}, 0
    if users:
        yield users, weight


async def _remembered(redis: Redis, base: str, oldest: int, shift: int) -> AsyncIterator[Operations]:
    """The ids that are known when they come again, by user."""
    async for keys in scanned(redis, f"{base}r:*"):
        for start in range(0, len(keys), USERS_AT_A_TIME):
            part = keys[start : start + USERS_AT_A_TIME]
            pipeline = redis.pipeline(transaction=False)
            for key in part:
                pipeline.hgetall(key)
            entries = await asked(pipeline.execute())
            users: Operations = {}
            for key, one in zip(part, entries, strict=True):
                ops: list[Any] = []
                for seq, mark in remembered_before(one, oldest):
                    ops += (6, seq - shift, mark)
                if ops:
                    users[key.decode().removeprefix(f"{base}r:")] = ops
            yield users


def remembered_before(entries: dict[bytes, bytes], oldest: int) -> list[tuple[int, str]]:
    """Sequence and fingerprint of each remembered notification that was stored before `oldest`, the newest last."""
    return sorted((int(seq), mark.decode()) for mark, seq in entries.items() if int(seq) < oldest)


async def _older(
    redis: Redis, base: str, users: list[str], oldest: int, shift: int
) -> AsyncIterator[tuple[str, int, list[Any]]]:
    pipeline = redis.pipeline(transaction=False)
    for user in users:
        pipeline.zrangebyscore(f"{base}s:{user}", "-inf", f"({oldest}", withscores=True)
        pipeline.hgetall(f"{base}d:{user}")
    answers = iter(await asked(pipeline.execute()))
    for user, ids, details in zip(users, answers, answers, strict=True):
        ops: list[Any] = []
        for id, seq in ids:
            ops += _operation(id.decode(), int(seq) - shift, details.get(b"i" + id))
        if ops:
            yield user, len(ids), ops


def _operation(id: str, seq: int, details: bytes | None) -> tuple[Any, ...]:
    if details is None:
        return (1, 0, seq, "", id)
    if details.startswith(b"c"):
        return (2, 0, seq, "", id, details[1:].decode())
    return (3, 0, seq, "", id, *_details(details[1:]))


async def carry_given_up(redis: Redis, partition: int, version: int, following: int, shift: int = 0) -> None:
    """That some were given up above the bound, or a count that is a lower bound would be taken for an exact one.

    Raises:
        StoreUnavailable: Redis does not answer.
    """
    base, new = key_prefix(partition, version), key_prefix(partition, following)
    async for keys in scanned(redis, f"{base}d:*"):
        pipeline = redis.pipeline(transaction=False)
        for key in keys:
            pipeline.hget(key, "m")
        for key, given_up in zip(keys, await asked(pipeline.execute()), strict=True):
            if given_up is not None:
                seq, _, until = given_up.decode().partition(",")
                words = f"{int(seq) - shift},{until}"
                await asked(redis.hset(new + key.decode().removeprefix(base), "m", words))
