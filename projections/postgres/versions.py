"""PostgreSQL as projections use it: transactions with a deadline, versions, and checkpoints that compare before they move."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from projections.outages import postgres_failure
from projections.store import Checkpoint, StoreBroken, StoreUnavailable

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]
    Connection = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

AWAY: Final = (
    OSError,
    TimeoutError,
    RuntimeError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""What the driver may raise: an outage, or a fault that `away` tells from one. The stored checkpoint tells what has happened."""

APPLY_SECONDS: Final = 30.0
"""One batch; a checkpoint that another transaction holds is waited for within it, such as that of a switch."""

QUERY_SECONDS: Final = 5.0
"""One question of a tool or an operator."""

_BEGIN: Final = (
    "BEGIN; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off"
)
"""A batch touches a few hundred rows by their keys, whatever the statistics of a table that has just grown say."""


@contextlib.asynccontextmanager
async def transaction(pool: Pool, seconds: float = APPLY_SECONDS) -> AsyncIterator[Connection]:
    """A transaction that commits at the end of the block, within a deadline.

    One that fails is not rolled back by asking: the connection is dropped, for the server may be the one that is silent.

    Raises:
        StoreUnavailable: the outcome may be unknown.
    """
    async with asking(pool, seconds) as connection:
        await connection.execute(_BEGIN)
        yield connection
        await connection.execute("COMMIT")


@contextlib.asynccontextmanager
async def asking(pool: Pool, seconds: float) -> AsyncIterator[Connection]:
    """A connection for what the block does, within a deadline; dropped when the block fails.

    Raises:
        StoreUnavailable: PostgreSQL does not answer in time. StoreBroken: it refuses, and asking again would not help.
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
            raise away(error) from error
        raise
    finally:
        if connection is not None:
            with contextlib.suppress(*AWAY):
                await pool.release(connection)


def away(error: BaseException) -> StoreUnavailable:
    """What to raise instead: `StoreUnavailable` where it passes by itself, else `StoreBroken`."""
    return postgres_failure(error)


async def live_version(connection: Connection, projection: str) -> int:
    """The version readers read."""
    version = await connection.fetchval("SELECT version FROM projection_versions WHERE projection = $1", projection)
    if version is None:
        raise StoreBroken(f"PostgreSQL: there is no projection {projection}", "Run `seamark migrate`.")
    return int(version)


async def stored_checkpoint(
    pool: Pool, projection: str, version: int, stream: str, partition: int, seconds: float
) -> asyncpg.Record | None:
    """`epoch`, `era` and `seq` of a checkpoint.

    Raises:
        StoreUnavailable: no answer in time.
    """
    async with asking(pool, seconds) as connection:
        return await connection.fetchrow(
            "SELECT epoch, era, seq FROM projection_checkpoints"
            " WHERE projection = $1 AND version = $2 AND stream = $3 AND partition = $4",
            projection,
            version,
            stream,
            partition,
        )


class Book:
    """The checkpoint of one projection of one stream partition.

    Args:
        projection: `inbox` or `deliveries`.
        version: a fixed one, for a rebuild; None: whichever is live, asked at every `read`.
    """

    def __init__(self, projection: str, stream: str, partition: int, version: int | None = None) -> None:
        self.projection = projection
        self.version = version or 1
        self._fixed = version is not None
        self._where = (stream, partition)

    async def read(self, connection: Connection) -> Checkpoint | None:
        """The stored checkpoint of the live (or fixed) version."""
        if not self._fixed:
            self.version = await live_version(connection, self.projection)
        row = await connection.fetchrow(
            "SELECT epoch, seq FROM projection_checkpoints"
            " WHERE projection = $1 AND version = $2 AND stream = $3 AND partition = $4",
            self.projection,
            self.version,
            *self._where,
        )
        return None if row is None else Checkpoint(row["epoch"], row["seq"])

    async def move(self, connection: Connection, expected: Checkpoint | None, reached: Checkpoint) -> int | None:
        """Move the checkpoint and hold it until the transaction ends; its era, or None when it was not as expected.

        A version that is no longer the live one does not move either: a rebuild has been switched to.
        """
        live = "" if self._fixed else "version = (SELECT version FROM projection_versions WHERE projection = $1) AND "
        args: list[Any] = [self.projection, self.version, *self._where, reached.epoch, reached.seq]
        if expected is None:
            era = await connection.fetchval(
                "INSERT INTO projection_checkpoints (projection, version, stream, partition, epoch, era, seq)"
                " SELECT * FROM (VALUES ($1, $2::integer, $3, $4::integer, $5, 1, $6::bigint))"
                f" AS v (projection, version, stream, partition, epoch, era, seq) WHERE {live}true"
                " ON CONFLICT DO NOTHING RETURNING era",
                *args,
            )
        else:
            era = await connection.fetchval(
                "UPDATE projection_checkpoints SET epoch = $5, seq = $6, updated_at = now()"
                f" WHERE {live}projection = $1 AND version = $2 AND stream = $3 AND partition = $4"
                " AND epoch = $7 AND seq = $8 RETURNING era",
                *args,
                *expected,
            )
        return None if era is None else int(era)
