"""Caps: how many messages of a channel a user has got of late, counted where all workers look.

A message takes its place when it is decided to be sent, so several that are decided at once do not all pass; it is known by its
notification, so a try of it, or another of its targets, takes no second one.
"""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime
from typing import Final

import structlog
from redis.asyncio import Redis

from engine.channels.channel import Job
from engine.outages import REDIS_AWAY
from engine.plan.decisions import Inputs
from engine.plan.rules import Cap, Channel
from engine.redisscript import RedisScript

_log = structlog.get_logger("seamark.worker")

REDIS_SECONDS: Final = 1.0

# KEYS: the places of a user. ARGV: the notification, how many there are, for how many milliseconds each is taken.
# Returns 0, or when the next one is free, in milliseconds since 1970.
_SCRIPT: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now - ARGV[3]))
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
local taken = redis.call('ZCARD', KEYS[1])
if taken >= tonumber(ARGV[2]) then
  local first = redis.call('ZRANGE', KEYS[1], taken - ARGV[2], taken - ARGV[2], 'WITHSCORES')
  return string.format('%d', first[2] + ARGV[3])
end
redis.call('ZADD', KEYS[1], string.format('%d', now), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 0
"""


def cap_of(inputs: Inputs, channel: Channel) -> tuple[str, Cap] | None:
    """The cap that holds for a notification, behind the pattern of the rule that says it; what is critical has none."""
    line = None if inputs.rule is None else inputs.rule.channels.get(channel)
    if inputs.rule is None or line is None or line.cap is None or inputs.critical:
        return None
    return inputs.rule.pattern, line.cap


class Caps:
    """Takes places."""

    def __init__(self, redis: Redis) -> None:
        self._script = RedisScript(redis, _SCRIPT)

    async def take(self, job: Job, pattern: str, cap: Cap) -> datetime | None:
        """Take a place for a job's notification; else when one is free. While Redis is away there is always one.

        Args:
            pattern: of the rule that says the cap: what it is about is counted together.
        """
        # The tenant is the hash tag: a user's places are one key of one node.
        key = f"cap:{{{job.tenant}}}:{job.channel}:{pattern}:{job.user}"
        member = hashlib.blake2b(job.id.encode(), digest_size=12).digest()
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                free_at = int(await self._script([key], [member, cap.limit, cap.period_seconds * 1000]))
        except REDIS_AWAY as error:
            _log.warning("caps_not_counted", why=type(error).__name__)
            return None
        return datetime.fromtimestamp(free_at / 1000, UTC) if free_at else None

    async def close(self) -> None:
        """Drop the connection; a later call opens another."""
        await self._script.close()
