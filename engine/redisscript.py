"""One Lua script on one Redis connection of its own, for a call that is made for every batch.

redis-py's way through client, pool, retry and telemetry costs 40 us a call and 1.5 us an argument. Here the command is
packed by hiredis and goes straight to a connection of the client's pool class, which keeps connecting, TLS and passwords.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from hiredis import pack_command
from redis.asyncio import Connection, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

Argument = str | bytes | int


class RedisScript:
    """A script that may be run twice: a call whose connection was lost is made once more.

    The first run may have succeeded, and only its answer been lost. A script that compares before it changes then answers the
    second run as if somebody else had been quicker. So its caller must read what is stored before it believes that answer.
    """

    def __init__(self, redis: Redis, script: str) -> None:
        self._pool = redis.connection_pool
        self._script = script
        self._sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        self._connection: Connection | None = None
        # One answer at a time: the server runs scripts one after the other anyway.
        self._lock = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """Whether a call is under way, which the next one would wait for."""
        return self._lock.locked()

    async def __call__(self, keys: Sequence[Argument], args: Sequence[Argument]) -> Any:
        """What the script returns.

        Raises:
            RedisError, OSError: as redis-py does. The caller sets the deadline; a call cut off drops its connection.
        """
        async with self._lock:
            try:
                return await self._run(keys, args)
            except (RedisConnectionError, RuntimeError):
                # The server was started anew, or has closed a connection that was idle; uvloop calls the latter RuntimeError.
                return await self._run(keys, args)

    async def _run(self, keys: Sequence[Argument], args: Sequence[Argument]) -> Any:
        try:
            return await self._ask("EVALSHA", self._sha, keys, args)
        except NoScriptError:
            return await self._ask("EVAL", self._script, keys, args)

    async def _ask(self, verb: str, script: str, keys: Sequence[Argument], args: Sequence[Argument]) -> Any:
        if self._connection is None:
            self._connection = self._new_connection()
        command = pack_command((verb, script, len(keys), *keys, *args))  # type: ignore[arg-type] # its stub knows no long tuple
        await self._connection.send_packed_command(command, check_health=False)
        return await self._connection.read_response()

    def _new_connection(self) -> Connection:
        connection: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        # With a time-out of its own it sends through asyncio.wait_for, which before Python 3.12 loses a cancellation
        # that comes at the same moment, and with it the caller's deadline.
        connection.socket_timeout = None
        return connection

    async def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            await self._connection.disconnect()
            self._connection = None
