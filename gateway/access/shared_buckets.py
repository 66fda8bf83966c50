"""Token buckets in Redis, for all gateways together; a bucket is one number (GCRA)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import structlog
from redis.asyncio import Redis

from engine.errors import StoreBroken
from engine.outages import REDIS_AWAY, redis_failure

_log = structlog.get_logger("seamark.shared_buckets")

REDIS_SECONDS: Final = 0.25
"""Deadline of one count in Redis: a silent Redis delays what is counted by no more."""

PAUSE_SECONDS: Final = 2.0
"""After a failure Redis is left alone this long."""

# Each key holds the moment at which its bucket is full again (GCRA). All are charged, or none.
_TAKE: Final = """
local clock = redis.call('TIME')
local now, cost, full_at = clock[1] + clock[2] / 1e6, tonumber(ARGV[1]), {}
for i, key in ipairs(KEYS) do
  local burst, rate = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  full_at[i] = math.max(tonumber(redis.call('GET', key) or now), now) + cost / rate
  local wait = full_at[i] - now - burst / rate
  if wait > 0 then return {i, tostring(wait)} end
end
for i, key in ipairs(KEYS) do
  redis.call('SET', key, string.format('%.6f', full_at[i]), 'PX', math.ceil((full_at[i] - now) * 1000))
end
return {0, '0'}
"""


class Bound(NamedTuple):
    """So much at once, and so much a second in the long run."""

    burst: float
    per_second: float


class Empty(NamedTuple):
    """Which of the buckets has too little, counted from 0, and when it will have enough."""

    bucket: int
    wait_seconds: float


class SharedBuckets:
    """Takes from buckets of all gateways together.

    Args:
        redis: None: there is none, as if it were always away.
        name: what is counted, for the log.
    """

    def __init__(self, redis: Redis | None, name: str) -> None:
        self._script = None if redis is None else redis.register_script(_TAKE)
        self._name = name
        self._away_until = 0.0

    async def take(self, keys: Sequence[str], cost: float, bounds: Sequence[Bound]) -> Empty | bool:
        """Take `cost` from all of these buckets, or from none. False: Redis is away, so nothing is known.

        Args:
            keys: in one slot of a Redis cluster, so with one hash tag.
        """
        if self._script is None or time.monotonic() < self._away_until:
            return False
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                which, wait = await self._script(list(keys), [cost, *(number for bound in bounds for number in bound)])
        except REDIS_AWAY as error:
            # uvloop raises a RuntimeError for a connection that was just lost; any other one is a bug.
            if isinstance(error, RuntimeError) and isinstance(redis_failure(error), StoreBroken):
                raise
            self._away_until = time.monotonic() + PAUSE_SECONDS
            _log.warning("counts_not_shared", what=self._name, error=type(error).__name__)
            return False
        return Empty(which - 1, float(wait)) if which else True
