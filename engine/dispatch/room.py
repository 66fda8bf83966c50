"""Whether LATER has room for one more event: below its watermark, and within the share of the event's tenant.

LATER cannot refuse, so its watermark says how much it may hold (ADR 0037). A tenant may have as much there as is still free below
it: one alone fills half, two that flood it a third each, and whoever comes next finds room. (JOBS has the same rule, see
`engine.planner.shares`.) How much a tenant has there no stream tells, so it is counted in Redis, by the day its events are due:
what was due seven days ago has left. A Redis that was lost begins to count anew, and half of what is free then is free again.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Final

import structlog
from redis.asyncio import Redis

from engine.broker.answers import WATERMARK_KEY
from engine.broker.jetstream import StreamState
from engine.broker.refusals import is_full
from engine.dispatch.burials import NEITHER, Burials, no_room
from engine.dispatch.claims import AWAY, PAUSE_SECONDS, TAKE_TIMEOUT_SECONDS
from engine.dispatch.rounds import Dead, Planned
from engine.errors import ApiError
from engine.limits import DUE_SECONDS, LATER_SUBJECTS_MAX
from engine.redisscript import RedisScript

_log = structlog.get_logger("seamark.dispatcher")

DAY_SECONDS: Final = 86_400
DUE_DAYS: Final = DUE_SECONDS // DAY_SECONDS

_OVERHEAD_BYTES: Final = 256
"""Subject and headers of an event that waits, and its part of a schedule."""

# What has left is forgotten, the rest summed up. Where that is not too much, what comes is added, and the sum before it is -1.
_TAKE: Final = """
local bytes, events = 0, 0
local held = redis.call('HGETALL', KEYS[1])
for i = 1, #held, 2 do
  local day, what = string.match(held[i], '^(%d+)(%a)$')
  if tonumber(day) < tonumber(ARGV[1]) then redis.call('HDEL', KEYS[1], held[i])
  elseif what == 'b' then bytes = bytes + tonumber(held[i + 1])
  else events = events + tonumber(held[i + 1]) end
end
if bytes > tonumber(ARGV[2]) or events > tonumber(ARGV[3]) then return {bytes, events} end
for i = 4, #ARGV, 3 do
  redis.call('HINCRBY', KEYS[1], ARGV[i] .. 'b', ARGV[i + 1])
  redis.call('HINCRBY', KEYS[1], ARGV[i] .. 'n', ARGV[i + 2])
end
redis.call('EXPIRE', KEYS[1], 40 * 86400)
return {-1, -1}
"""


def full(later: StreamState) -> str | None:
    """Why LATER takes no more events of anybody; None: it takes some."""
    most = most_bytes(later)
    if later.bytes >= most:
        return f"{later.name} holds {later.bytes} of {most} bytes: publish the event when it is due"
    if later.subjects >= LATER_SUBJECTS_MAX:
        return f"events wait for {LATER_SUBJECTS_MAX} different times: publish the event when it is due"
    return None


def most_bytes(later: StreamState) -> int:
    """What LATER may hold."""
    return int(later.metadata.get(WATERMARK_KEY, sys.maxsize))


def most_of_one(later: StreamState) -> tuple[int, int]:
    """How many bytes, and how many events, one tenant may have in LATER.

    Their number counts only where times are getting scarce. Each is taken for a time of its own then.
    """
    scarce = later.subjects > LATER_SUBJECTS_MAX // 2
    return most_bytes(later) - later.bytes, LATER_SUBJECTS_MAX - later.subjects if scarce else sys.maxsize


class Shares:
    """How much each tenant has waiting in LATER, over all dispatchers."""

    def __init__(self, redis: Redis) -> None:
        self._take = RedisScript(redis, _TAKE)
        self._away_until = 0.0

    async def refused(self, events: Iterable[Planned], later: StreamState) -> dict[int, str]:
        """Which of these events are not put off because their tenant has too much there, with the reason.

        While Redis is away nobody is refused.
        """
        most = most_of_one(later)
        why: dict[int, str] = {}
        for tenant, theirs in _by_tenant(events).items():
            bytes_, number = await self._call(tenant, most)
            if bytes_ >= 0:
                said = f"its tenant has {bytes_} bytes of {number} events in {later.name}, more than is free"
                why |= {event.seq: f"{said}: publish the event when it is due" for event in theirs}
        return why

    async def count(self, events: Iterable[Planned]) -> None:
        """Count events that are put off now. Give those that were claimed: what was published before has been counted.

        An event that is put off again after a crash counts twice.
        """
        for tenant, theirs in _by_tenant(events).items():
            days: dict[int, list[int]] = defaultdict(lambda: [0, 0])
            for event in theirs:
                assert event.later is not None
                counts = days[max(_day(event.accepted.event.send_at), _today())]  # what is overdue is put off to now
                counts[0] += len(event.later.payload) + _OVERHEAD_BYTES
                counts[1] += 1
            await self._call(tenant, (sys.maxsize, sys.maxsize), days)

    async def _call(
        self, tenant: str, most: tuple[int, int], days: Mapping[int, Sequence[int]] = MappingProxyType({})
    ) -> tuple[int, int]:
        """The bytes and events that a tenant has there, if that is more than `most`. Else what `days` says is counted: -1, -1.

        Args:
            days: the bytes and events that are added, by the day on which they are due.
        """
        if time.monotonic() < self._away_until:
            return -1, -1
        args = [_today() - DUE_DAYS, *most, *(word for day, counts in days.items() for word in (day, *counts))]
        try:
            async with asyncio.timeout(TAKE_TIMEOUT_SECONDS):
                bytes_, number = await self._take([key_of(tenant)], args)
        except AWAY as error:
            self._away_until = time.monotonic() + PAUSE_SECONDS
            _log.warning("shares_not_counted", error=type(error).__name__)
            return -1, -1
        return bytes_, number

    async def close(self) -> None:
        """Drop the connection they are counted on."""
        await self._take.close()


async def without_room(
    events: Sequence[Planned],
    later: StreamState,
    shares: Shares | None,
    burials: Burials,
    bury: Callable[[Dead], Awaitable[None]],
) -> dict[int, Dead]:
    """Those of a round's events that LATER has no room for, by their numbers. Their letters are stored, or left for want of room.

    Args:
        events: all of the round that are to be put off.
        bury: stores a letter.

    Raises:
        BrokerError: a letter could not be stored, though not for want of room.
    """
    why, dead = full(later), dict[int, Dead]()
    if burials.refused is None:
        if why is not None:
            refused = {event.seq: why for event in events}
        else:
            refused = {} if shares is None else await shares.refused(events, later)
        try:
            for event in events:
                if event.seq in refused:
                    await bury(no_room(event, refused[event.seq]))
                    dead[event.seq] = no_room(event, refused[event.seq])
            return dead
        except ApiError as error:
            if not is_full(error):
                raise
    # No mark of LATER may pass an event that is left, so nothing of this round is put off.
    dead = {event.seq: no_room(event, NEITHER) for event in events}
    if dead:
        burials.refuse(min(dead), max(dead))
    return dead


def key_of(tenant_token: str) -> str:
    """Where a tenant's share of LATER is counted."""
    return f"later:{{{tenant_token}}}"


def _by_tenant(events: Iterable[Planned]) -> Mapping[str, list[Planned]]:
    found: dict[str, list[Planned]] = defaultdict(list)
    for event in events:
        found[event.accepted.at.tenant_token].append(event)
    return found


def _today() -> int:
    return int(time.time()) // DAY_SECONDS


def _day(due: datetime | None) -> int:
    assert due is not None
    return int(due.timestamp()) // DAY_SECONDS
