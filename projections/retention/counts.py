"""Takes off the unread counts what leaves the inbox, so that a badge and the list under it say the same.

What is remembered of an id goes with its row, too: published again, it is new in both (ADR 16). To repeat anything here changes
nothing; StoreUnavailable says that some may be left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from redis.asyncio import Redis

from engine.errors import StoreUnavailable
from projections.unread.store import UnreadStore, asked, users_of

TRIES: Final = 200
"""A projector at work moves the checkpoint some ten times a second; between two of its scripts there is room for one of ours."""

LEFT_KEY: Final = "unread:left"
"""A hash: up to which sequence rows have left, by `<epoch>.<tenant>`. Of a rebuild that has read the counts before they were
taken off, the new version holds them still: it looks here after its switch."""

LEFT_SECONDS: Final = 7 * 86_400
"""No rebuild takes that long."""

Floors = Mapping[str, Mapping[str, int]]
"""Sequences up to which rows have left, by epoch of the log and tenant (as token)."""


@contextlib.asynccontextmanager
async def _store(redis: Redis, partition: int) -> AsyncIterator[UnreadStore]:
    store = UnreadStore(redis, partition)
    try:
        yield store
    finally:
        await store.close()


async def forget_counts(redis: Redis, partition: int, floors: Floors) -> None:
    """Forget what counts, and which ids are remembered, of the records up to a sequence."""
    async with _store(redis, partition) as store:
        checkpoint = await store.checkpoint()
        tenants = floors.get(checkpoint.epoch) if checkpoint is not None else None
        if not tenants:
            return  # nothing counts, or records of another log
        for kind in ("s", "r"):
            async for page in users_of(redis, partition, store.version, kind):
                found = {user: tenants[tenant] for user in page if (tenant := user.partition(".")[0]) in tenants}
                await _forget(store, {user: [5, seq, 8, seq] for user, seq in found.items()})


async def forget_former(redis: Redis, partition: int, users: Mapping[str, list[str]]) -> None:
    """Forget notifications of a former incarnation of the log by their ids: what sequence they have here is not known.

    Args:
        users: ids by `<tenant>.<user>`, as tokens; `WEIGHT_MAX` of them at most.
    """
    async with _store(redis, partition) as store:
        if await store.checkpoint() is not None:
            gone = {user: [word for id in ids for word in (7, id)] for user, ids in users.items()}
            await _forget(store, gone)


async def write_left(redis: Redis, floors: Floors) -> None:
    """Remember what is about to be forgotten, for a rebuild that is under way."""
    before = await read_left(redis)
    words: dict[Any, Any] = {
        f"{epoch}.{tenant}": max(seq, before.get(epoch, {}).get(tenant, 0))
        for epoch, tenants in floors.items()
        for tenant, seq in tenants.items()
    }
    if words:
        await asked(redis.hset(LEFT_KEY, mapping=words))
        await asked(redis.expire(LEFT_KEY, LEFT_SECONDS))


async def read_left(redis: Redis) -> dict[str, dict[str, int]]:
    """What has left within the last days."""
    floors: dict[str, dict[str, int]] = {}
    for word, seq in (await asked(redis.hgetall(LEFT_KEY))).items():
        epoch, _, tenant = word.decode().partition(".")
        floors.setdefault(epoch, {})[tenant] = int(seq)
    return floors


async def _forget(store: UnreadStore, users: dict[str, list[Any]]) -> None:
    for attempt in range(TRIES):
        if not users or await store.forget(users):
            return
        await asyncio.sleep(0.001 * min(attempt, 20))
    raise StoreUnavailable("Redis: counts of what has left the inbox cannot be forgotten, the projector is too busy")
