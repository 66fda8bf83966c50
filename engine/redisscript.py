"""One Lua script on one Redis connection of its own, for a call that is made for every batch, or job.

redis-py's way through client, pool, retry and telemetry costs 40 us a call and 1.5 us an argument. Here the command is
packed by hiredis and goes straight to a connection of the client's pool class, which keeps connecting, TLS and passwords.
Calls that are made while others are under way go together in the next write, and their answers come together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio import Connection, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError

from engine.questions import Questions

Argument = str | bytes | int

Call = tuple[Sequence[Argument], Sequence[Argument]]
"""Keys and arguments."""

CALLS_MAX: Final = 128
"""Calls of one write: Redis answers them in a row, which takes it some 2 ms."""


class RedisScript:
    """A script that may be run twice: a call whose connection was lost is made once more.

    The first run may have succeeded, and only its answer been lost. A script that compares before it changes then answers the
    second run as if somebody else had been quicker. So its caller must read what is stored before it believes that answer.

    Args:
        seconds: the deadline of a write and its answers; a call waits for two of them at most. None: the caller sets one, and
            once all that were made together are given up their connection is dropped.
        turns: as of `Questions`.
    """

    def __init__(self, redis: Redis, script: str, *, seconds: float | None = None, turns: int = 1) -> None:
        self._pool = redis.connection_pool
        self._script = script
        self._sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        self._connection: Connection | None = None
        self._calls: Questions[Call, Any] = Questions(
            "redis-script", self._run, seconds=seconds, most=CALLS_MAX, turns=turns
        )

    @property
    def busy(self) -> bool:
        """Whether a call is under way, which the next one would wait for."""
        return self._calls.busy

    async def __call__(self, keys: Sequence[Argument], args: Sequence[Argument]) -> Any:
        """What the script returns.

        Raises:
            RedisError, OSError: as redis-py does. The caller sets the deadline; once all that were made together are given up,
            their connection is dropped.
        """
        answer = await self._calls.answer((keys, args))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _run(self, calls: Sequence[Call]) -> list[Any]:
        """What each of these calls returns, or raises."""
        answers: dict[int, Any] = {}
        verb, script, lost = "EVALSHA", self._sha, False
        while left := [number for number in range(len(calls)) if number not in answers]:
            try:
                connection, first = await self._ready()
                packed = []
                for keys, args in (calls[number] for number in left):
                    command = (verb, script, len(keys), *keys, *first, *args)
                    packed.append(pack_command(command))  # type: ignore[arg-type] # its stub knows no long tuple
                await connection.send_packed_command(b"".join(packed), check_health=False)
                for number in left:
                    try:
                        answers[number] = await connection.read_response()
                    except NoScriptError:
                        verb, script = "EVAL", self._script
                    except ResponseError as error:
                        answers[number] = error
            except (RedisError, OSError, RuntimeError) as error:
                # The server was started anew, or has closed a connection that was idle; uvloop calls the latter RuntimeError.
                if lost or not isinstance(error, RedisConnectionError | RuntimeError):
                    answers = dict.fromkeys(left, error) | answers
                lost = True
        return [answers[number] for number in range(len(calls))]

    async def _ready(self) -> tuple[Connection, Sequence[Argument]]:
        """The connection, and what a script is told first on it."""
        if self._connection is None:
            self._connection = self._new_connection()
        return self._connection, ()

    def _new_connection(self) -> Connection:
        connection: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        # With a time-out of its own it sends through asyncio.wait_for, which before Python 3.12 loses a cancellation
        # that comes at the same moment, and with it the caller's deadline.
        connection.socket_timeout = None
        return connection

    async def close(self) -> None:
        """Drop the connection."""
        await self._calls.close()
        if self._connection is not None:
            await self._connection.disconnect()
            self._connection = None
