"""PostgreSQL as projections use it: versions, and checkpoints that compare before they move."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import asyncpg

from engine.errors import StoreBroken
from engine.postgres import Connection, Pool, asking
from projections.store import Checkpoint

LOCK_SECONDS: Final = 0.25
"""How long to wait for those who read a table before it is taken away. Whoever wants to read it meanwhile waits, too."""

LOCK_TRIES: Final = 5


async def take_away(pool: Pool, work: Callable[[Connection], Awaitable[bool]]) -> bool:
    """Do `work`, which takes tables from all who read them, in a transaction that keeps nobody waiting for long.

    Returns:
        what `work` does; False where somebody read a table for long each time it was tried, a backup perhaps.
    """
    for _ in range(LOCK_TRIES):
        async with asking(pool, 60.0) as connection:
            try:
                async with connection.transaction():
                    await connection.execute(f"SET LOCAL lock_timeout = {round(LOCK_SECONDS * 1000)}")
                    return await work(connection)
            except asyncpg.LockNotAvailableError:
                pass
        await asyncio.sleep(LOCK_SECONDS * 2)
    return False


def live(projection: str) -> str:
    """SQL: the version of a projection that readers read."""
    return f"(SELECT version FROM projection_versions WHERE projection = '{projection}')"


async def live_version(connection: Connection, projection: str) -> int:
    """The version readers read."""
    version = await connection.fetchval(f"SELECT {live(projection)}")
    if version is None:
        raise StoreBroken(f"PostgreSQL: there is no projection {projection}", "Run `seamark migrate`.")
    return int(version)


class Place(NamedTuple):
    """A stored checkpoint. `era` counts the incarnations of the stream: rows of an older one come before those of a newer one."""

    checkpoint: Checkpoint
    era: int


async def read_place(
    connection: Connection, projection: str, stream: str, partition: int, version: int | None = None
) -> Place | None:
    """The stored checkpoint of a partition, in the live version unless another one is named."""
    row = await connection.fetchrow(
        "SELECT epoch, seq, era FROM projection_checkpoints WHERE projection = $1 AND stream = $2 AND partition = $3"
        f" AND version = {live(projection) if version is None else version}",
        projection,
        stream,
        partition,
    )
    return None if row is None else Place(Checkpoint(row["epoch"], row["seq"]), row["era"])


async def leaves(connection: Connection, table: str) -> list[str]:
    """The tables directly below a partitioned one, by name."""
    rows = await connection.fetch(
        "SELECT c.relname FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid WHERE h.inhparent = to_regclass($1)",
        table,
    )
    return [row["relname"] for row in rows]


async def filled_leaves(connection: Connection, table: str) -> list[str]:
    """The tables below one, or itself where it is not divided, that may hold rows. They stay until the transaction ends.

    The table itself is locked before them, in the order of whoever takes a month off it: else a month that is being taken off
    would still be listed, and a row that only it holds be taken for one that is there.
    """
    await connection.execute(f"LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE")
    tree = "SELECT relid::regclass::text AS name FROM pg_partition_tree($1::text::regclass)"
    rows = await connection.fetch(f"{tree} WHERE isleaf AND pg_relation_size(relid) > 0 ORDER BY name", table)
    return [row["name"] for row in rows]
