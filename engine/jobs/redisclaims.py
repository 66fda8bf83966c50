"""Claims in Redis: one script that looks, and writes if what it finds is what it was told to expect.

Which claim may follow which is decided in `claims`; here is only what has to be one step: to compare, to take the time of the
server's clock, and to notice that this server is not the one that was told the claims.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import msgspec
from redis.asyncio import Connection, Redis

from engine.dispatch.claims import AWAY, PAUSE_SECONDS
from engine.jobs.claims import CLAIM_KEPT_SECONDS, Claim, ClaimsUnavailable, Look
from engine.redisscript import Argument, RedisScript

CLAIM_TIMEOUT_SECONDS: Final = 2.0
"""A healthy Redis answers in less than a millisecond; a job whose claim takes longer goes on as if there was none, or waits."""

_BORN_KEPT_SECONDS: Final = int(2 * CLAIM_KEPT_SECONDS)

# KEYS: the claim; since when this server has kept what it was told. ARGV: the server's run, how long the latter is kept, and of
# a write: since when it is expected to have kept everything, what is expected to be stored, the new claim, its lease, its life.
# Times are microseconds as text: Lua would write them in scientific notation. A stored claim is `<lease's end> <written> <JSON>`.
_SCRIPT: Final = """
local t = redis.call('TIME')
local now = string.format('%.0f', t[1] * 1000000 + t[2])
local run, born = string.match(redis.call('GET', KEYS[2]) or '', '^(%S*) (%d+)$')
if run ~= ARGV[1] then
  born = now
  redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. born, 'EX', ARGV[2])
end
local found = redis.call('GET', KEYS[1]) or ''
if ARGV[3] and born == ARGV[3] and found == ARGV[4] then
  found = string.format('%.0f', now + ARGV[6]) .. ' ' .. now .. ' ' .. ARGV[5]
  redis.call('SET', KEYS[1], found, 'PX', ARGV[7])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
end
return {found, born, now}
"""

_encode = msgspec.json.Encoder().encode
_decode: msgspec.json.Decoder[Claim] = msgspec.json.Decoder(Claim)


class _Script(RedisScript):
    """The script, told which run of the server it is on: another run may have lost what this one was told last.

    A server that was started anew, or a replica that was promoted, is reached by another connection; so each is asked once.
    """

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, _SCRIPT, seconds=CLAIM_TIMEOUT_SECONDS)
        self._run_id: Argument = ""

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
        return await self._call(key, ())

    async def put(
        self, key: str, expected: Look, claim: Claim, *, lease_seconds: float = 0, keep_seconds: float
    ) -> Look:
        """Store `claim` if `expected` is still what is stored, on a server that has lost nothing since; what is stored then.

        A call may be made twice; the second then finds what the first has stored.

        Raises:
            ClaimsUnavailable: Redis did not answer in time; it may be stored, now or soon.
        """
        said = (_encode(claim), int(lease_seconds * 1e6), max(1, int(keep_seconds * 1e3)))
        return await self._call(key, (_micros(expected.born), expected.raw, *said))

    async def _call(self, key: str, write: Sequence[Argument]) -> Look:
        tenant, _, rest = key.partition("/")
        keys = (f"job:{{{tenant}}}:{rest}", f"jobs:{{{tenant}}}:born")
        if time.monotonic() < self._away_until:
            raise ClaimsUnavailable
        try:
            found, born, now = await self._script(keys, (_BORN_KEPT_SECONDS, *write))
        except AWAY as error:
            self._away_until = time.monotonic() + PAUSE_SECONDS
            raise ClaimsUnavailable from error
        return _look(found, born, now)

    async def close(self) -> None:
        """Drop the connection; a later call opens another."""
        await self._script.close()


def _look(found: bytes, born: bytes, now: bytes) -> Look:
    if not found:
        return Look(None, b"", 0.0, 0.0, int(now) / 1e6, int(born) / 1e6)
    until, written, body = found.split(b" ", 2)
    return Look(_decode.decode(body), found, int(until) / 1e6, int(written) / 1e6, int(now) / 1e6, int(born) / 1e6)


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"
