"""Takes off the unread counts what leaves the inbox, so that a badge and the list under it say the same."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from redis.asyncio import Redis

from projections.store import StoreUnavailable
from projections.unread import CLEAR_WEIGHT, WEIGHT_MAX, UnreadStore, meta_key, read_version, scanned

USERS_AT_A_TIME: Final = WEIGHT_MAX // CLEAR_WEIGHT

TRIES: Final = 200
"""A projector at work moves the checkpoint some ten times a second; between two of its scripts there is room for one of ours."""


async def forget_counts(redis: Redis, partition: int, epoch: str, floors: Mapping[str, int]) -> None:
    """Forget what counts of the records up to a sequence, by tenant (as token); of a log of incarnation `epoch`.

    To repeat it changes nothing.

    Raises:
        StoreUnavailable: Redis does not answer; some are left.
    """
    store = UnreadStore(redis, partition)
    try:
        checkpoint = await store.checkpoint()
        if checkpoint is None or checkpoint.epoch != epoch:
            return  # nothing counts, or records of another log
        prefix = f"{meta_key(partition, await read_version(redis)).removesuffix('meta')}s:"
        async for keys in scanned(redis, f"{prefix}*"):
            users = [key.decode().removeprefix(prefix) for key in keys]
            found = {user: floors[tenant] for user in users if (tenant := user.partition(".")[0]) in floors}
            names = list(found)
            for start in range(0, len(names), USERS_AT_A_TIME):
                await _forget(store, {user: found[user] for user in names[start : start + USERS_AT_A_TIME]})
    finally:
        await store.close()


async def _forget(store: UnreadStore, users: dict[str, int]) -> None:
    for attempt in range(TRIES):
        if await store.forget(users):
            return
        await asyncio.sleep(0.001 * min(attempt, 20))
    raise StoreUnavailable("Redis: counts of what has left the inbox cannot be forgotten, the projector is too busy")
