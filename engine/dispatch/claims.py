"""Claims: which event a (tenant, event id) belongs to, so that publishing it again within the horizon adds nothing.

A claim's value is the event's own position. Whoever reads the event again (after a crash, a take-over, a rewind) finds its
own position and goes on; a second publication finds another's and is a duplicate. No window, no cleaning up after crashes, nor
after EVENTS was restored from a backup: positions of its earlier incarnations keep their meaning up to the backup's end.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine import metrics
from engine.errors import StoreUnavailable
from engine.limits import CLAIM_SECONDS, CLAIMS_OWED_MAX
from engine.redisscript import RedisScript
from engine.tasks import end_if_cancelled
from seamark.protocol.errors import SeamarkError
from seamark.protocol.subjects import encode_token

_log = structlog.get_logger("seamark.claims")

TAKE_TIMEOUT_SECONDS = 2.0
PAUSE_SECONDS = 1.0
"""After a failure Redis is left alone this long: a batch must not pay the time-out again and again."""

WATCH_SECONDS = 5.0
SENTINEL_KEY = "claims:sentinel"

AWAY = (RedisError, OSError, TimeoutError, RuntimeError)
"""What says that Redis is away. uvloop raises RuntimeError when a connection is written to that was lost a moment ago."""

# The same for an event that had to wait: its id may be claimed by the event as it was before, and by nobody else from then on.
# So a schedule that fires a second time, as after a restore of LATER, adds nothing.
_TAKE_OVER = """
local out = {}
for i = 1, #KEYS do
  local held = redis.call('SET', KEYS[i], ARGV[2 * i], 'NX', 'GET', 'EX', ARGV[1])
  if held and string.find(' ' .. ARGV[2 * i + 1] .. ' ', ' ' .. held .. ' ', 1, true) then
    redis.call('SET', KEYS[i], ARGV[2 * i], 'EX', ARGV[1])
    held = false
  end
  out[i] = held or ''
end
return out
"""

# One script per tenant and batch: 1.4 us of our CPU per claim where a pipeline of commands costs 8.9.
_TAKE = """
local out = {}
for i = 1, #KEYS do
  out[i] = redis.call('SET', KEYS[i], ARGV[i + 1], 'NX', 'GET', 'EX', ARGV[1]) or ''
end
return out
"""


# Compared before it is set: a server that was started anew since it told its run would be noticed by each who asked before.
_TELL_RUN = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class ClaimsUnavailable(SeamarkError):
    """Redis does not answer, so it is unknown which events were published before."""


class Claim(msgspec.Struct, frozen=True, gc=False):
    """An event id and the position (`<epoch>.<seq>` in EVENTS) of the event that claims it.

    `former`: its positions in the earlier incarnations of its stream that held this very event. `instead_of`: those of the event
    that was put off, where this is the one that is due.
    """

    tenant_token: str
    event_id: str
    position: str
    former: tuple[str, ...] = ()
    instead_of: tuple[str, ...] = ()


def claim_key(tenant_token: str, event_id: str) -> str:
    """The key of a claim. The tenant is the hash tag: one script touches one slot of a Redis cluster."""
    return f"claim:{{{tenant_token}}}:{event_id}"


class Claims:
    """Takes claims; remembers those it could not take while Redis was away and takes them afterwards.

    Args:
        horizon_seconds: how long a claim is remembered.
    """

    def __init__(self, redis: Redis, *, horizon_seconds: int = CLAIM_SECONDS) -> None:
        self._redis = redis
        self._horizon_seconds = horizon_seconds
        self._take = RedisScript(redis, _TAKE)
        self._take_over = RedisScript(redis, _TAKE_OVER)
        self._tell_run = RedisScript(redis, _TELL_RUN)
        self._owed: deque[Claim] = deque()
        self._away_until = 0.0

    async def take(self, claims: Sequence[Claim]) -> list[bool]:
        """For each claim: is it ours (new, or taken before by this very event)?

        Raises:
            ClaimsUnavailable: Redis did not answer in time; nothing is known.
        """
        if time.monotonic() < self._away_until:
            raise ClaimsUnavailable
        try:
            async with asyncio.timeout(TAKE_TIMEOUT_SECONDS):
                await self._pay_owed()
                return await self._take_all(claims)
        except AWAY as error:
            self._away_until = time.monotonic() + PAUSE_SECONDS
            _log.warning("claims_not_taken", error=type(error).__name__)
            raise ClaimsUnavailable from error

    async def _take_all(self, claims: Sequence[Claim]) -> list[bool]:
        by_tenant: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for index, claim in enumerate(claims):
            by_tenant[claim.tenant_token, bool(claim.instead_of)].append(index)
        ours = [True] * len(claims)
        for (tenant_token, due), indexes in by_tenant.items():
            chosen, prefix = [claims[index] for index in indexes], claim_key(tenant_token, "")
            keys = [prefix + claim.event_id for claim in chosen]
            holders: list[bytes]
            if due:
                pairs = [word for claim in chosen for word in (claim.position, " ".join(claim.instead_of))]
                holders = await self._take_over(keys, [self._horizon_seconds, *pairs])
            else:
                holders = await self._take(keys, [self._horizon_seconds, *(claim.position for claim in chosen)])
            for index, holder in zip(indexes, holders, strict=True):
                if holder:  # most claims are new
                    claim = claims[index]
                    ours[index] = holder.decode() in (claim.position, *claim.former)
        return ours

    def owe(self, claims: Sequence[Claim]) -> None:
        """These went on unclaimed; they are written when Redis answers again, the list permitting."""
        # What could not be written after all is put back into a list that others have filled meanwhile.
        room = max(0, CLAIMS_OWED_MAX - len(self._owed))
        self._owed.extend(claims[:room])
        metrics.claims_missed.labels("owed").inc(min(room, len(claims)))
        metrics.claims_missed.labels("lost").inc(max(0, len(claims) - room))

    async def _pay_owed(self) -> None:
        while self._owed:
            chunk = [self._owed.popleft() for _ in range(min(500, len(self._owed)))]
            try:
                await self._take_all(chunk)
            except BaseException:
                self._owed.extendleft(reversed(chunk))
                raise

    async def close(self) -> None:
        """Drop the connection claims are taken on; a later `take` opens another."""
        await self._take.close()
        await self._take_over.close()
        await self._tell_run.close()

    async def watch(self) -> None:
        """Notice for ever when Redis has lost its claims (another run, no sentinel): the horizon starts anew then."""
        while True:
            try:
                async with asyncio.timeout(TAKE_TIMEOUT_SECONDS):
                    await self._check_horizon()
                    await self._pay_owed()
            except AWAY as error:
                _log.debug("horizon_not_checked", error=type(error).__name__)
            end_if_cancelled()
            await asyncio.sleep(WATCH_SECONDS)

    async def _check_horizon(self) -> None:
        asked = self._redis.pipeline(transaction=False)
        asked.info("server")
        asked.get(SENTINEL_KEY)
        info, before = cast(tuple[dict[str, Any], bytes | None], await asked.execute())
        run_id = str(info.get("run_id", ""))  # some hosted servers do not tell it
        if before is not None and before.decode() == run_id:
            return
        if await self._tell_run([SENTINEL_KEY], [before or b"", run_id]):
            metrics.horizon_restarts.inc()
            why = "Redis held no sentinel" if before is None else "Redis was started anew"
            _log.warning("deduplication_starts_anew", why=why)


_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


async def release(redis: Redis, tenant: str, event_id: str, position: str) -> None:
    """Take a claim off the event at this position, which was not dispatched: it is published again, and is no repetition.

    Raises:
        StoreUnavailable: Redis does not answer.
    """
    try:
        async with asyncio.timeout(TAKE_TIMEOUT_SECONDS):
            asked: Any = redis.eval(_RELEASE, 1, claim_key(encode_token(tenant), event_id), position)
            await asked
    except AWAY as error:
        raise StoreUnavailable(f"Redis does not answer: {type(error).__name__}") from error
