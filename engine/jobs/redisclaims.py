"""Claims in Redis: one script that looks at claims, and writes where what it finds is what it was told to expect.

Which claim may follow which is decided in `claims`; here is only what has to be one step: to compare, to take the time of the
server's clock, and to notice that this server is not the one that was told the claims.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
from redis.asyncio import Connection, Redis

from engine.dispatch.claims import AWAY, PAUSE_SECONDS
from engine.jobs.claims import CLAIM_KEPT_SECONDS, Claim, ClaimsUnavailable, Look
from engine.limits import JOBS_TURNS
from engine.redisscript import Argument, Call, RedisScript

CLAIM_TIMEOUT_SECONDS: Final = 2.0
"""A healthy Redis answers in less than a millisecond; a job whose claim takes longer goes on as if there was none, or waits."""

SAID_SECONDS_MAX: Final = 60.0
"""What Redis has said of a tenant stands in place of a look for no longer than this."""

TENANTS_MAX: Final = 10_000
"""How many tenants are remembered with what Redis said last. Beyond that all are forgotten."""

_BORN_KEPT_SECONDS: Final = int(2 * CLAIM_KEPT_SECONDS)

# KEYS: since when this server has kept what it was told; claims of the same tenant. ARGV: the server's run, how long the former
# is kept, and of each claim: since when the server is expected to have kept everything ('': it is only looked at), what is
# expected to be stored, the new claim, its lease, its life. Times are microseconds as text: Lua would write them in scientific
# notation. A stored claim is `<lease's end> <written> <JSON>`. Of each the answer is 1 where it was written, else what is stored.
_SCRIPT: Final = """
local t = redis.call('TIME')
local now = string.format('%.0f', t[1] * 1000000 + t[2])
local run, born = string.match(redis.call('GET', KEYS[1]) or '', '^(%S*) (%d+)$')
if run ~= ARGV[1] then
  born = now
  redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. born, 'EX', ARGV[2])
end
local answers, wrote = {born, now}, false
for i = 2, #KEYS do
  local at = 5 * i - 7
  local found = redis.call('GET', KEYS[i]) or ''
  if ARGV[at] == born and ARGV[at + 1] == found then
    local said = string.format('%.0f', now + ARGV[at + 3]) .. ' ' .. now .. ' ' .. ARGV[at + 2]
    redis.call('SET', KEYS[i], said, 'PX', ARGV[at + 4])
    found, wrote = 1, true
  end
  answers[i + 1] = found
end
if wrote then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return answers
"""

_ONLY_LOOK: Final = ("", "", "", 0, 0)

_encode = msgspec.json.Encoder().encode
_decode: msgspec.json.Decoder[Claim] = msgspec.json.Decoder(Claim)


class _Said(NamedTuple):
    """What Redis said last of a tenant: times by its clock, in microseconds, and when that was by ours, in seconds."""

    born: int
    now: int
    at: float


class _Script(RedisScript):
    """The script, told which run of the server it is on: another run may have lost what this one was told last.

    A server that was started anew, or a replica that was promoted, is reached by another connection; so each is asked once.

    A call's keys are that of its tenant and that of its claim; its answer is what was found, and the server's `born` and `now`.
    Calls that go together are one call for each tenant: by itself, each would cost Redis and us three times as much.
    """

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, _SCRIPT, seconds=CLAIM_TIMEOUT_SECONDS, turns=JOBS_TURNS)
        self._run_id: Argument = ""
        self._said: dict[Argument, _Said] = {}

    def said(self, tenant: str) -> _Said | None:
        """What the server said last of a tenant, by its key, if that was a moment ago."""
        said = self._said.get(tenant)
        return None if said is None or time.monotonic() - said.at > SAID_SECONDS_MAX else said

    def forget(self) -> None:
        """Forget what the server has said: it is away."""
        self._said.clear()

    async def _run(self, calls: Sequence[Call]) -> list[Any]:
        of_tenants: dict[Argument, list[int]] = {}
        for number, ((tenant, _), _) in enumerate(calls):
            of_tenants.setdefault(tenant, []).append(number)
        together = list[Call]()
        for tenant, numbers in of_tenants.items():
            keys, args = [tenant], list[Argument]((_BORN_KEPT_SECONDS,))
            for number in numbers:
                (_, claim), write = calls[number]
                keys.append(claim)
                args += write or _ONLY_LOOK
            together.append((keys, args))
        said, answers = await super()._run(together), dict[int, Any]()
        if len(self._said) > TENANTS_MAX:
            self._said.clear()
        for (tenant, numbers), answer in zip(of_tenants.items(), said, strict=True):
            if isinstance(answer, Exception):
                answers |= dict.fromkeys(numbers, answer)
            else:
                born, now = int(answer[0]), int(answer[1])
                self._said[tenant] = _Said(born, now, time.monotonic())
                answers |= {number: (found, born, now) for number, found in zip(numbers, answer[2:], strict=True)}
        return [answers[number] for number in range(len(calls))]

    async def _ready(self) -> tuple[Connection, Sequence[Argument]]:
        if self._connection is None or not self._connection.is_connected:
            if self._connection is not None:
                await self._connection.disconnect()
            connection, self._connection = self._new_connection(), None
            try:
                self._run_id = await _run_of(connection)
            except BaseException:
                await connection.disconnect(nowait=True)  # none may be used of which the run is not known
                raise
            self._connection = connection
        return self._connection, (self._run_id,)


async def _run_of(connection: Connection) -> Argument:
    """The run of the server behind a connection, which changes whenever a server begins with what its disk or its primary had."""
    await connection.connect()  # type: ignore[no-untyped-call]
    await connection.send_command("INFO", "server")
    told = await connection.read_response()
    text = told.decode() if isinstance(told, bytes) else str(told)
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return lines.get("run_id", "") or "unknown"  # some hosted servers do not tell it


class RedisClaims:
    """Looks at claims and writes them, each within a deadline. The tenant is the hash tag of its keys in a cluster."""

    def __init__(self, redis: Redis) -> None:
        self._script = _Script(redis)
        self._away_until = 0.0

    async def look(self, key: str) -> Look:
        """The claim of a job.

        Raises:
            ClaimsUnavailable: Redis did not answer in time.
        """
        return _look(*await self._call(key, ()))

    def unbegun(self, key: str) -> Look | None:
        """What a look would have said a moment ago of a job that nobody had begun; None: nothing was heard of late.

        See `engine.jobs.claims.Claims`.
        """
        said = self._script.said(_tenant_key(_tag(key.partition("/")[0])))
        return None if said is None else Look(None, b"", 0.0, 0.0, said.now / 1e6, said.born / 1e6, assumed=True)

    async def put(
        self, key: str, expected: Look, claim: Claim, *, lease_seconds: float = 0, keep_seconds: float
    ) -> Look:
        """Store `claim` if `expected` is still what is stored, on a server that has lost nothing since; what is stored then.

        A call may be made twice; the second then finds what the first has stored.

        Raises:
            ClaimsUnavailable: Redis did not answer in time; it may be stored, now or soon.
        """
        body, lease = _encode(claim), int(lease_seconds * 1e6)
        write = (_micros(expected.born), expected.raw, body, lease, max(1, int(keep_seconds * 1e3)))
        found, born, now = await self._call(key, write)
        if found != 1:
            return _look(found, born, now)
        raw = b"%d %d %b" % (now + lease, now, body)
        return Look(claim, raw, (now + lease) / 1e6, now / 1e6, now / 1e6, born / 1e6)

    async def _call(self, key: str, write: Sequence[Argument]) -> tuple[Any, int, int]:
        """What was found, the server's `born` and `now`."""
        tenant, _, rest = key.partition("/")
        tag = _tag(tenant)
        if time.monotonic() < self._away_until:
            raise ClaimsUnavailable
        try:
            answer: tuple[Any, int, int] = await self._script((_tenant_key(tag), f"job:{{{tag}}}:{rest}"), write)
            return answer
        except AWAY as error:
            self._away_until = time.monotonic() + PAUSE_SECONDS
            self._script.forget()
            raise ClaimsUnavailable from error

    async def close(self) -> None:
        """Drop the connection; a later call opens another."""
        await self._script.close()


def _look(found: bytes, born: int, now: int) -> Look:
    if not found:
        return Look(None, b"", 0.0, 0.0, now / 1e6, born / 1e6)
    until, written, body = found.split(b" ", 2)
    return Look(_decode.decode(body), found, int(until) / 1e6, int(written) / 1e6, now / 1e6, born / 1e6)


def _tag(tenant: str) -> str:
    """The hash tag of a tenant's keys. A brace at its beginning would end it, and an empty one keeps no keys together.

    A percent sign is escaped in keys of jobs, so no other tenant has this tag.
    """
    return tenant if not tenant.startswith("}") else f"%7D{tenant[1:]}"


def _tenant_key(tag: str) -> str:
    return f"jobs:{{{tag}}}:born"


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"
