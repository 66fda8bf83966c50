"""The bucket of a provider in Redis: one for all workers, by the server's clock. `bucket` says in Python what the script does."""

from __future__ import annotations

import asyncio
from typing import Final

from redis.asyncio import Redis

from engine.dispatch.claims import AWAY
from engine.jobs import bucket
from engine.jobs.bucket import Limit
from engine.redisscript import RedisScript
from seamark.protocol.errors import SeamarkError

BUCKET_TIMEOUT_SECONDS: Final = 2.0
"""A healthy Redis answers in less than a millisecond."""

_KEPT_MILLISECONDS: Final = 3_600_000
"""A bucket that nobody takes from is full, and its pace whole, after ten minutes."""

# KEYS: the bucket. ARGV: per second, burst, longest wait; with a pace that was refused: nothing. Numbers are seconds.
_SCRIPT: Final = f"""
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local held = redis.call('HMGET', KEYS[1], 'until', 'pace', 'paced_at')
local level = {{tonumber(held[1]) or 0, tonumber(held[2]) or 1, tonumber(held[3]) or 0}}
local pace = math.min(1, level[2] + math.max(0, now - level[3]) * {bucket.REGAIN_PER_SECOND!r})
local answer
if ARGV[1] then
  local gap = 1 / (ARGV[1] * pace)
  local free = math.max(level[1], now)
  local seconds = math.max(0, free - (ARGV[2] - 1) * gap - now)
  local taken = seconds <= tonumber(ARGV[3])
  if taken then level[1] = free + gap else seconds = seconds - ARGV[3] end
  answer = {{taken and 1 or 0, string.format('%.6f', seconds)}}
elseif now - level[3] >= {bucket.HALVING_SECONDS!r} or level[2] >= 1 then
  level[2] = math.max({bucket.PACE_MIN!r}, pace / 2)
  level[3] = now
end
redis.call('HSET', KEYS[1], 'until', string.format('%.6f', level[1]), 'pace', string.format('%.9f', level[2]),
  'paced_at', string.format('%.6f', level[3]))
redis.call('PEXPIRE', KEYS[1], {_KEPT_MILLISECONDS})
return answer
"""


def bucket_script(redis: Redis) -> RedisScript:
    """The script that all buckets run."""
    return RedisScript(redis, _SCRIPT)


class BucketUnavailable(SeamarkError):
    """Redis did not answer in time: whether there is a slot is not known."""


class RedisBucket:
    """The limit of one provider, or of one key of it.

    Args:
        script: of `bucket_script`, where many share one connection; whoever made it closes it.
    """

    def __init__(self, redis: Redis, name: str, limit: Limit, script: RedisScript | None = None) -> None:
        self._script = script or bucket_script(redis)
        self._key = f"limit:{{{name}}}"
        self._limit = limit

    async def take(self, *, wait_seconds_max: float = 0.0) -> tuple[bool, float]:
        """Take the next slot: whether there is one, and the seconds until it, or until it is worth asking again.

        A call whose answer was lost may take two slots: too few are sent then, never too many.

        Raises:
            BucketUnavailable: Redis did not answer in time.
        """
        limit = self._limit
        taken, seconds = await self._call(repr(limit.per_second), limit.burst, repr(wait_seconds_max))
        return bool(taken), float(seconds)

    async def refused(self) -> None:
        """The provider has said that it was too much: halve the pace, once a second.

        Raises:
            BucketUnavailable: Redis did not answer in time.
        """
        await self._call()

    async def _call(self, *args: str | int) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(BUCKET_TIMEOUT_SECONDS):
                answer: tuple[int, bytes] = await self._script([self._key], args)
                return answer
        except AWAY as error:
            raise BucketUnavailable from error

    async def close(self) -> None:
        """Drop the connection; a later call opens another."""
        await self._script.close()
