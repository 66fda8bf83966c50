"""`Idempotency-Key`: a request that is sent again is answered as the first time, and nothing is done twice.

What is remembered lies in Redis, for all gateways together. A key belongs to the first body that came with it, for a day. While
its request runs, others with it are told to wait. Once it was carried out, they get its answer. One that was refused leaves
nothing.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, NamedTuple

import structlog
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from engine.errors import StoreBroken
from engine.outages import redis_failure
from engine.redisscript import RedisScript
from engine.tasks import patiently_within
from gateway import metrics
from gateway.http.limits import (
    IDEMPOTENCY_ANSWER_BYTES,
    IDEMPOTENCY_BURST_BYTES,
    IDEMPOTENCY_BYTES_PER_DAY,
    IDEMPOTENCY_KEPT_SECONDS,
    IDEMPOTENCY_KEY_BYTES,
    IDEMPOTENCY_RUNNING_SECONDS,
)
from gateway.http.problems import UNAVAILABLE, Kind, Problem, problem_of
from seamark.protocol.subjects import encode_token

_log = structlog.get_logger("seamark.idempotency")

HEADER: Final = "Idempotency-Key"
REPLAYED: Final = "Idempotency-Replayed"

INVALID_KEY: Final = Kind(400, "invalid_idempotency_key")
RUNNING: Final = Kind(409, "idempotency_running")
OTHER_BODY: Final = Kind(422, "idempotency_key_reused")
TOO_MANY: Final = Kind(429, "too_many_idempotency_keys")
PROBLEMS: Final = (INVALID_KEY, RUNNING, OTHER_BODY, TOO_MANY)

CarryOut = Callable[[str], Awaitable[tuple[web.StreamResponse, bool]]]

_KEY: Final = re.compile(rf"[ -~]{{1,{IDEMPOTENCY_KEY_BYTES}}}")

REDIS_SECONDS: Final = 2.0
"""Deadline of one question to Redis."""

CONNECTIONS: Final = 8
"""Connections to Redis for beginnings, and as many for ends. One takes a turn of the loop for each request; with a thousand at
once turns are long, and the last one would wait for longer than the deadline."""

SETTLE_TRIES: Final = 3
"""How often it is said how a request has ended, where Redis is slow: a replay is worth a few seconds, an outage is not."""

SILENT_SECONDS: Final = 10.0
"""A Redis that has answered nothing for so long is away. Before that this process may be slow, or Redis for a moment."""

PAUSE_SECONDS: Final = 1.0
"""After a failure Redis is left alone this long: not every request shall pay for the time-out."""

_OVERHEAD_BYTES: Final = 400
"""What a key costs Redis beside key and answer: its hash with four members, and the entry in the table of keys."""

# A bucket holds the moment at which it is full again (GCRA), as those of `gateway.access.allowances` do.
_BEGIN: Final = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local known = redis.call('HMGET', KEYS[1], 'of', 'owner', 'until', 'status', 'answer', 'day')
if known[1] then
  local runs = not known[4] and known[2] ~= ARGV[2] and tonumber(known[3]) > now
  if runs then return {'running'} end -- another body, too: this one may yet be refused
  if known[1] ~= ARGV[1] then return {'other'} end
  if known[4] then return {'done', known[4], known[5]} end
  redis.call('HSET', KEYS[1], 'tried', '1')
else
  local cost, burst, rate = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
  local full_at = math.max(tonumber(redis.call('GET', KEYS[2]) or now), now) + cost / rate
  local wait = full_at - now - burst / rate
  if wait > 0 then return {'full', tostring(wait)} end
  redis.call('SET', KEYS[2], string.format('%.6f', full_at), 'PX', math.ceil((full_at - now) * 1000))
end
local day = known[6] or ARGV[8]
redis.call('HSET', KEYS[1], 'of', ARGV[1], 'owner', ARGV[2], 'until', string.format('%.6f', now + ARGV[3]), 'day', day)
redis.call('EXPIRE', KEYS[1], ARGV[4])
return {'first', day}
"""

# Only whoever holds the key says how it ended; a second run of the script (its answer was lost) finds no owner and does nothing.
_END: Final = """
local how, owner, kept, bytes, rate = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
if redis.call('HGET', KEYS[1], 'owner') ~= owner then return 0 end
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
-- What is refused this time may have been done by an earlier run of it, whose outcome nobody knows.
if how == 'forget' and redis.call('HEXISTS', KEYS[1], 'tried') == 1 then how = 'again' end
if how == 'forget' then
  redis.call('DEL', KEYS[1])
  bytes = -bytes
elseif how == 'again' then
  redis.call('HSET', KEYS[1], 'owner', '', 'until', '0')
  return 1
else
  redis.call('HSET', KEYS[1], 'owner', '', 'status', ARGV[6], 'answer', ARGV[7])
  redis.call('EXPIRE', KEYS[1], kept)
end
local full_at = tonumber(redis.call('GET', KEYS[2]) or now) + bytes / rate
if full_at > now then
  redis.call('SET', KEYS[2], string.format('%.6f', full_at), 'PX', math.ceil((full_at - now) * 1000))
else
  redis.call('DEL', KEYS[2])
end
return 1
"""


class Kept(NamedTuple):
    """An answer that was given before."""

    status: int
    body: bytes

    def response(self) -> web.Response:
        """It, said to be a replay."""
        headers = {"Cache-Control": "no-store", REPLAYED: "true"}
        return web.Response(status=self.status, body=self.body, content_type="application/json", headers=headers)


class Held(NamedTuple):
    """A key that this request holds until it ends. `day`: on which it came first, see `named`."""

    names: tuple[str, str]
    owner: str
    cost: int
    day: int


class IdempotencyKeys:
    """Which keys were used, by which body, and what was answered.

    While Redis is away requests go on without it. What a handler does twice for one key must therefore be one thing, by ids that
    it makes from the key; the ids of events are recognised without Redis for two minutes, and by their claims afterwards.

    Args:
        redis: shared by all gateways.
        bytes_per_day, burst_bytes: how much of it a tenant may fill.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        bytes_per_day: float = IDEMPOTENCY_BYTES_PER_DAY,
        burst_bytes: float = IDEMPOTENCY_BURST_BYTES,
        kept_seconds: int = IDEMPOTENCY_KEPT_SECONDS,
        running_seconds: float = IDEMPOTENCY_RUNNING_SECONDS,
    ) -> None:
        self._begins = [RedisScript(redis, _BEGIN) for _ in range(CONNECTIONS)]
        self._ends = [RedisScript(redis, _END) for _ in range(CONNECTIONS)]
        self._rate, self._burst = bytes_per_day / 86_400, burst_bytes
        self._kept_seconds, self._running_seconds = kept_seconds, running_seconds
        self._away_until = 0.0
        self._silent_since: float | None = None
        # One for the process, where `alone` lets no two requests hold a key: what a call did whose answer was lost is its own.
        self._owner = secrets.token_hex(8)
        self._here: set[tuple[str, str]] = set()

    @contextmanager
    def alone(self, tenant: str, key: str) -> Iterator[None]:
        """The only request with this key in this process, for as long as the block runs: for that, Redis need not be asked.

        Raises:
            Problem: there is one.
        """
        if (tenant, key) in self._here:
            metrics.gateway_idempotency_keys.labels("running").inc()
            raise _running()
        self._here.add((tenant, key))
        try:
            yield
        finally:
            self._here.discard((tenant, key))

    async def begin(self, tenant: str, key: str, fingerprint: bytes) -> Held | Kept | None:
        """Hold a key for a request, or find what was answered before. None: Redis is away, so nothing is remembered.

        Raises:
            Problem: 409, 422 or 429; 503 where Redis is slow, and for the first seconds in which it is silent: a process that is
                busy for long must not take it for away.
        """
        token = encode_token(tenant) if tenant else "="  # the hash tag: one script touches one slot of a Redis cluster
        names = f"idempotency:{{{token}}}:{key}", f"allowance:{{{token}}}:idempotency"
        owner, cost = self._owner, _OVERHEAD_BYTES + len(key)
        limits = (self._running_seconds, self._kept_seconds, cost, self._burst, self._rate, today())
        try:
            said = await self._ask(self._begins, names, [fingerprint, owner, *map(repr, limits)])
        except TimeoutError as error:
            # The key may be held for this request by now: who sends it again to another process must not wait for a minute.
            await self._settle(Held(names, owner, cost, 0), "again", 0, tries=1)
            text = "what is known of the key was not answered in time; nothing was done: send the request again"
            raise Problem(UNAVAILABLE, text) from error
        word = "unkept" if said is None else said[0].decode()
        metrics.gateway_idempotency_keys.labels(word).inc()
        match word:
            case "unkept":
                return None
            case "first":
                return Held(names, owner, cost, int(said[1]))
            case "done":
                return Kept(int(said[1]), said[2])
            case "running":
                raise _running()
            case "other":
                said = f"this {HEADER} came with another request before: take a new key for a new request"
                raise Problem(OTHER_BODY, said, field=HEADER)
        wait = max(1, math.ceil(float(said[1])))
        text = f"too many requests with an {HEADER} are remembered: events with an `id` need none to be known again"
        raise Problem(TOO_MANY, text, retry_after_seconds=wait)

    async def done(self, held: Held, status: int, body: bytes) -> None:
        """The request was carried out and is answered so. An answer that is too large is made anew when it is asked for again."""
        if len(body) > IDEMPOTENCY_ANSWER_BYTES:
            await self.again(held)
        else:
            await self._settle(held, "done", len(body), str(status), body)

    async def forget(self, held: Held) -> None:
        """Nothing was done: whoever comes next with the key is the first, unless an earlier run of it may have done something."""
        await self._settle(held, "forget", held.cost)

    async def again(self, held: Held) -> None:
        """It may have been done, or in part: the same request may be tried again at once, no other one."""
        await self._settle(held, "again", 0)

    async def _settle(self, held: Held, how: str, size: int, *answer: str | bytes, tries: int = SETTLE_TRIES) -> None:
        args = [how, held.owner, self._kept_seconds, size, repr(self._rate), *answer]
        for _ in range(tries):
            with suppress(
                TimeoutError
            ):  # after the last one, the key is free for this body when its time to run is over
                await self._ask(self._ends, held.names, args)
                return

    async def _ask(self, scripts: list[RedisScript], keys: tuple[str, str], args: list[str | bytes | int]) -> Any:
        """What the script says; None where Redis is away.

        Raises:
            TimeoutError: it is slow, or silent for not very long.
        """
        if time.monotonic() < self._away_until:
            return None
        try:
            async with patiently_within(REDIS_SECONDS):
                # The first that is free: one that was used before is connected.
                script = next((each for each in scripts if not each.busy), random.choice(scripts))
                said = await script(keys, args)
        except (TimeoutError, RedisTimeoutError) as error:
            self._silent_since = self._silent_since or time.monotonic()
            if time.monotonic() - self._silent_since < SILENT_SECONDS:
                raise TimeoutError from error
            return self._away("silent")
        except (RedisError, OSError, RuntimeError) as error:
            # uvloop raises a RuntimeError for a connection that was just lost; any other one is a bug.
            if isinstance(error, RuntimeError) and isinstance(redis_failure(error), StoreBroken):
                raise
            return self._away(type(error).__name__)
        self._silent_since = None
        return said

    def _away(self, why: str) -> None:
        self._away_until = time.monotonic() + PAUSE_SECONDS
        _log.warning("idempotency_keys_not_kept", why=why)

    async def close(self) -> None:
        """Drop the connections."""
        for script in (*self._begins, *self._ends):
            await script.close()


def _running() -> Problem:
    return Problem(RUNNING, f"a request with this {HEADER} is being carried out: wait", retry_after_seconds=1)


def today() -> int:
    """The number of the day, in UTC."""
    return int(time.time() // 86_400)


def named(key: str, day: int) -> str:
    """What ids of a request come from: its key, and the day on which that came first.

    Ids are known for longer than keys are. A key that is used anew after a day must not make what was there before.
    """
    return f"{key}.{day}"


def always(_answer: Any) -> bool:
    """Every answer is final."""
    return True


def key_of(request: web.Request) -> str | None:
    """The key of a request, if it has one.

    Raises:
        Problem: it is none.
    """
    key = request.headers.get(HEADER)
    if key is not None and (_KEY.fullmatch(key) is None or key != key.strip()):
        said = f"`{HEADER}` must be 1 to {IDEMPOTENCY_KEY_BYTES} printable ASCII characters"
        raise Problem(INVALID_KEY, said, field=HEADER)
    return key


def fingerprint(request: web.Request, body: bytes) -> bytes:
    """What a request asks for: the same for the same bytes sent to the same place."""
    digest = hashlib.sha256(f"{request.method} {request.raw_path}\n".encode("utf-8", "surrogateescape"))
    digest.update(body)
    return digest.digest()


async def once(
    keys: IdempotencyKeys,
    tenant: str,
    key: str,
    asked: bytes,
    carry_out: CarryOut,
) -> web.StreamResponse:
    """The answer to a request with a key: what `carry_out` gives, and what it has given before.

    Args:
        asked: the request's fingerprint.
        carry_out: is told what ids come from, and gives the answer, and whether it is final. One that is not is given once: the
            same request is tried again.

    Raises:
        Problem: as `begin`; and whatever `carry_out` raises.
    """
    with keys.alone(tenant, key):
        held = await keys.begin(tenant, key, asked)
        if isinstance(held, Kept):
            return held.response()
        if held is None:
            return (await carry_out(named(key, today())))[0]
        return await _carried_out(keys, held, partial(carry_out, named(key, held.day)))


async def _carried_out(
    keys: IdempotencyKeys, held: Held, carry_out: Callable[[], Awaitable[tuple[web.StreamResponse, bool]]]
) -> web.StreamResponse:
    try:
        response, final = await carry_out()
    except Exception as error:
        # What is refused has done nothing. After anything else it is unknown, and another body must not pass for this one.
        await (keys.forget(held) if problem_of(error).kind.status < 500 else keys.again(held))
        raise
    if final and isinstance(response, web.Response) and isinstance(response.body, bytes):
        await keys.done(held, response.status, response.body)
    else:
        await keys.again(held)
    return response
