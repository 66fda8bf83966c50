"""Profiles in Redis, read through: ten minutes old at most, and right within a second of each change.

Whoever changes a user marks him first, commits, and takes the mark off. Who finds a mark asks the primary and stores nothing.
Who finds nothing gets a lease, reads the primary and stores what it read, if the lease is still there: every mark ends it. So
what was read before a change is never stored after it, and nothing has to be compared. A mark of somebody who died ends by
itself; by then his transaction is over, since marks outlast the longest transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
import structlog
from redis.asyncio import Redis

from engine.limits import JOBS_TURNS
from engine.outages import REDIS_AWAY, redis_failure
from engine.plan.profile import Profile
from engine.questions import Questions
from engine.redisscript import Argument, RedisScript
from seamark.protocol.subjects import encode_token

_log = structlog.get_logger("seamark.profiles")

KEPT_SECONDS: Final = 600
"""How long a profile is kept. It is also how long one can be wrong after Redis has lost a mark and its writer has died, too."""

MARK_SECONDS: Final = 50
"""How much longer than its transaction a mark lasts: with the 10 s of a change, what a dead writer costs is a minute."""

LEASE_SECONDS: Final = 10
"""How long somebody may take to read the primary. Others who look meanwhile read it, too, and store nothing."""

REDIS_SECONDS: Final = 1.0
PAUSE_SECONDS: Final = 1.0
"""After a failure Redis is left alone this long: readers ask the primary."""

KEYS_PER_CALL: Final = 500
"""Marks that one call sets: a millisecond of Redis's time."""

LOOKS_PER_CALL: Final = 128
"""Profiles that one call looks for: half a millisecond of Redis's time."""

_NOW: Final = "local clock = redis.call('TIME')\nlocal now = clock[1] * 1000 + math.floor(clock[2] / 1000)\n"

# Each mark takes the body away, and none is stored while a mark stands: so where there is a body there is no mark to look for.
_LOOK: Final = f"""{_NOW}
local function look(key)
  local body = redis.call('HGET', key, 'body')
  if body then return body end
  local marked, found, ended = false, {{}}, {{}}
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 5) ~= 'mark:' then found[all[i]] = all[i + 1]
    elseif tonumber(all[i + 1]) > now then marked = true
    else ended[#ended + 1] = all[i] end
  end
  if #ended > 0 then redis.call('HDEL', key, unpack(ended, 1, math.min(#ended, 1000))) end
  if marked then return 'marked' end
  if found.lease and found.lease ~= ARGV[1] and tonumber(found.lease_until) > now then return 'leased' end
  redis.call('HSET', key, 'lease', ARGV[1], 'lease_until', string.format('%d', now + ARGV[2]))
  redis.call('PEXPIRE', key, ARGV[2])
  return 'yours'
end
local answers = {{}}
for i, key in ipairs(KEYS) do answers[i] = look(key) end
return answers
"""

# Where the lease stands there is no mark: each mark takes it away.
_FILL: Final = """
if redis.call('HGET', KEYS[1], 'lease') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'body', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

_MARK: Final = f"""{_NOW}
for _, key in ipairs(KEYS) do
  redis.call('HDEL', key, 'body', 'lease', 'lease_until')
  redis.call('HSET', key, 'mark:' .. ARGV[1], string.format('%d', now + ARGV[2]))
  if redis.call('PTTL', key) < tonumber(ARGV[2]) then redis.call('PEXPIRE', key, ARGV[2]) end
end
"""

# Body and lease go once more, in case Redis had lost the mark and somebody has read what was there before the change.
_SETTLE: Final = """
for _, key in ipairs(KEYS) do redis.call('HDEL', key, 'mark:' .. ARGV[1], 'body', 'lease', 'lease_until') end
"""

_encode: Final = msgspec.json.Encoder().encode
_read: Final = msgspec.json.Decoder(Profile).decode
_read_again: Final = functools.lru_cache(maxsize=4096)(_read)

ALIKE_BYTES_MAX: Final = 512
"""Users with the same document share one object if it is no larger: most have said nothing of their own."""


def _decode(body: bytes) -> Profile:
    return _read_again(body) if len(body) <= ALIKE_BYTES_MAX else _read(body)


class ProfileCache:
    """Profiles of all tenants, and the marks of those who change them (`engine.directory.changing.ProfileMarks`).

    Args:
        redis: shared by all processes that read or change profiles.
        read: a profile as the primary has it, never a replica; raises StoreUnavailable.
    """

    def __init__(self, redis: Redis, read: Callable[[str, str], Awaitable[Profile]]) -> None:
        self._read = read
        self._look, self._fill = (RedisScript(redis, script, seconds=REDIS_SECONDS) for script in (_LOOK, _FILL))
        self._mark, self._settle = RedisScript(redis, _MARK), RedisScript(redis, _SETTLE)
        self._looks = Questions("profile-looks", self._look_up, most=LOOKS_PER_CALL, turns=JOBS_TURNS)
        self._away_until = 0.0

    async def of(self, tenant: str, user: str) -> Profile:
        """The profile of a user.

        Raises:
            StoreUnavailable: neither Redis nor PostgreSQL says it.
        """
        _key(tenant, user)  # a name that cannot be fails here, not those asked about with it
        found = await self._looks.answer((tenant, user))
        return found if isinstance(found, Profile) else await self._read_through((tenant, user), found)

    async def of_all(self, users: Sequence[tuple[str, str]]) -> list[Profile]:
        """The profiles of users, each by tenant and name, in their order.

        Redis is asked once for many of one tenant.
        """
        found = await self._look_up(users)
        missing = ((user, lease) for user, lease in zip(users, found, strict=True) if isinstance(lease, str))
        read = iter(await asyncio.gather(*(self._read_through(user, lease) for user, lease in missing)))
        return [next(read) if isinstance(one, str) else one for one in found]

    async def _look_up(self, users: Sequence[tuple[str, str]]) -> list[Profile | str]:
        """What Redis has of users: profiles, or else the token of a lease by which what is read may be stored; "": none."""
        found: list[Profile | str] = [""] * len(users)
        token, of_tenants = secrets.token_hex(8), dict[str, list[int]]()
        for number, (tenant, _) in enumerate(users):
            of_tenants.setdefault(tenant, []).append(number)
        parts = [
            numbers[at : at + LOOKS_PER_CALL]
            for numbers in of_tenants.values()
            for at in range(0, len(numbers), LOOKS_PER_CALL)
        ]

        async def look_up(part: Sequence[int]) -> None:
            start = _keys_of(users[part[0]][0])
            keys = [start + encode_token(users[number][1]) for number in part]
            answers = await self._asked(self._look, keys, [token, LEASE_SECONDS * 1000])
            for number, answer in zip(part, answers or (), strict=False):
                if answer == b"yours":
                    found[number] = token
                elif answer.startswith(b"{"):  # else it is marked, or leased to somebody else
                    # One that another version of Seamark has stored is gone in ten minutes.
                    with contextlib.suppress(msgspec.DecodeError):
                        found[number] = _decode(answer)

        if len(parts) == 1:
            await look_up(parts[0])  # mostly, and a task costs as much as looking up several users
        else:
            await asyncio.gather(*(look_up(part) for part in parts))
        return found

    async def _read_through(self, user: tuple[str, str], lease: str) -> Profile:
        """A profile as the primary has it, which is stored with a lease."""
        profile = await self._read(*user)
        if lease:
            await self._asked(self._fill, [_key(*user)], [lease, _encode(profile), KEPT_SECONDS * 1000])
        return profile

    async def pending(self, tenant: str, users: Sequence[str], seconds: float) -> str:
        """Mark users before a change that takes `seconds` at most; returns the token by which `settled` knows the marks.

        Raises:
            StoreUnavailable: Redis does not say that it has them, so nothing may be changed.
        """
        token = secrets.token_hex(8)
        try:
            await self._for_all(self._mark, tenant, users, [token, round((seconds + MARK_SECONDS) * 1000)])
        except REDIS_AWAY as error:
            raise redis_failure(error) from error
        return token

    async def settled(self, tenant: str, users: Sequence[str], token: str) -> None:
        """Take marks off: the change was committed, or rolled back. What cannot be taken off ends by itself."""
        try:
            await self._for_all(self._settle, tenant, users, [token])
        except REDIS_AWAY as error:
            _log.warning("profiles_stay_marked", users=len(users), error=type(error).__name__)

    async def _for_all(self, script: RedisScript, tenant: str, users: Sequence[str], args: Sequence[Argument]) -> None:
        keys = [_key(tenant, user) for user in users]
        for start in range(0, len(keys), KEYS_PER_CALL):
            async with asyncio.timeout(REDIS_SECONDS):
                await script(keys[start : start + KEYS_PER_CALL], args)

    async def _asked(self, script: RedisScript, keys: Sequence[Argument], args: Sequence[Argument]) -> Any:
        """What a script returns; None where Redis is away."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return await script(keys, args)
        except REDIS_AWAY as error:
            failure = redis_failure(error)
            self._away_until = time.monotonic() + PAUSE_SECONDS
            _log.warning("profiles_not_cached", error=str(failure))
            return None

    async def close(self) -> None:
        """Drop the connections."""
        await self._looks.close()
        for script in (self._look, self._fill, self._mark, self._settle):
            await script.close()


def _keys_of(tenant: str) -> str:
    """What all keys of a tenant begin with. Braces: they are in one slot of a cluster, as one script sets many marks."""
    return f"profile:{{{encode_token(tenant)}}}:"


def _key(tenant: str, user: str) -> str:
    return _keys_of(tenant) + encode_token(user)
