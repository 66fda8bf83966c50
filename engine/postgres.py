"""PostgreSQL as all rooms use it: a pool's connections, each within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, TypeAlias

import asyncpg

from engine.errors import StoreUnavailable
from engine.outages import postgres_failure
from seamark.protocol.errors import SeamarkError

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

AWAY: Final = (OSError, TimeoutError, RuntimeError, asyncpg.PostgresError, asyncpg.InterfaceError,
               asyncpg.InternalClientError)  # fmt: skip
"""What the driver may raise: an outage, or a fault; `postgres_failure` tells which."""

QUERY_SECONDS: Final = 5.0
"""One question of a tool, an operator or a projector."""

LOOK_SECONDS: Final = 30.0
"""A statement of a verification, or the rows of one user."""


async def lazy_pool(
    url: str, connections: int, *, connect_seconds: float, statement_seconds: float | None = None
) -> Pool:
    """A pool of at most so many connections, made when they are first needed: whoever has one starts while PostgreSQL is away.

    Args:
        statement_seconds: how long a statement may take for which its caller names no other time.
    """
    pool = asyncpg.create_pool(
        url,
        min_size=0,
        max_size=connections,
        timeout=connect_seconds,
        command_timeout=statement_seconds,
        reset=_left_as_it_is,
    )
    await pool
    return pool


async def _left_as_it_is(_connection: object) -> None:
    """Ask nothing of a connection that is given back. A transaction that is open is ended all the same.

    The driver would reset the session, and so each question would cost two round trips. All settings here are `SET LOCAL`,
    and who takes a lock for the session (`holding`) drops the connection.
    """


@contextlib.asynccontextmanager
async def asking(pool: Pool, seconds: float = QUERY_SECONDS) -> AsyncIterator[Connection]:
    """A connection for what the block does, within a deadline.

    Where the block fails the connection is dropped: to roll back by asking would wait for a server that may be silent.

    Raises:
        StoreUnavailable: no answer in time; the outcome may be unknown. StoreBroken: asking again would not help.
    """
    connection: Connection | None = None
    try:
        async with asyncio.timeout(seconds):
            connection = await pool.acquire()
            yield connection
    except BaseException as error:
        if connection is not None:
            with contextlib.suppress(*AWAY):
                connection.terminate()  # what was given up must not be waited for
        if isinstance(error, AWAY):
            raise postgres_failure(error) from error
        raise
    finally:
        if connection is not None:
            with contextlib.suppress(*AWAY):
                await pool.release(connection)


@contextlib.asynccontextmanager
async def one_view(pool: Pool, seconds: float = LOOK_SECONDS) -> AsyncIterator[Connection]:
    """A connection on which all statements of the block see the database as the first of them sees it. Raises as `asking`."""
    async with asking(pool, seconds) as connection:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield connection
        await connection.execute("COMMIT")


@contextlib.asynccontextmanager
async def holding(pool: Pool, lock: int) -> AsyncIterator[Connection | None]:
    """A connection that holds an advisory lock, so that of all processes one does the work of the block; None: another has it.

    The lock belongs to the connection: whoever loses that, or dies, is followed by another process.
    """
    connection = await pool.acquire(timeout=QUERY_SECONDS)
    try:
        mine = await connection.fetchval("SELECT pg_try_advisory_lock($1)", lock, timeout=QUERY_SECONDS)
        yield connection if mine else None
    finally:
        with contextlib.suppress(*AWAY):
            connection.terminate()
        with contextlib.suppress(*AWAY):
            await pool.release(connection)


@contextlib.asynccontextmanager
async def transaction(pool: Pool, seconds: float = QUERY_SECONDS) -> AsyncIterator[Connection]:
    """A connection in a transaction that commits when the block ends, all within a deadline. Raises as `asking`.

    Where the block fails nothing is stored; where the commit is not answered, the outcome is unknown. An error of ours, such as a
    conflict, is rolled back and raised, and the connection kept: whoever provokes them shall not have us connect each time.
    """
    refused: SeamarkError | None = None
    async with asking(pool, seconds) as connection:
        await connection.execute("BEGIN")
        try:
            yield connection
        except StoreUnavailable:
            raise
        except SeamarkError as error:
            refused = error
        await connection.execute("COMMIT" if refused is None else "ROLLBACK")
    if refused is not None:
        raise refused


def transposed(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Columns of rows: arguments of a statement over arrays."""
    return [list(column) for column in zip(*rows, strict=True)]
