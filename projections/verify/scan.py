"""Reads a table of a projection from one end to the other, block by block as it lies: no view of the database lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import asyncpg

from engine.errors import StoreBroken, TopologyError
from engine.patience import patiently
from engine.postgres import LOOK_SECONDS, Pool, asking
from projections.postgres.versions import live_version
from projections.replay import Progress

BLOCKS: Final = 1024
"""Blocks of a table that one statement reads: 8 MB, in some 10 ms."""


async def scan(
    pool: Pool, projection: str, table: str, columns: str, progress: Progress, where: str = "true"
) -> AsyncIterator[list[asyncpg.Record]]:
    """Rows of the live version, some at a time, in no order. One that changes meanwhile may come twice, or not at all.

    Raises:
        StoreUnavailable: the database was away for too long. TopologyError: another version was switched to.
    """
    version = await patiently(_live_version, pool, projection)
    parts = await patiently(parts_of, pool, table)
    total, done = sum(blocks for _, blocks in parts), 0
    for name, blocks in parts:
        statement = (
            f"SELECT {columns} FROM {name} WHERE version = {version} AND ({where})"
            " AND ctid >= $1::text::tid AND ctid < $2::text::tid"
        )
        for start in range(0, blocks, BLOCKS):
            stop = min(blocks, start + BLOCKS)
            rows = await patiently(_stretch, pool, statement, start, stop)
            if rows is None:
                if await patiently(_live_version, pool, projection) != version:
                    raise TopologyError("a rebuild has switched to another version meanwhile", "Run it again.")
                break  # it was a month that is over, and the log holds nothing of what was in it
            yield rows
            progress(f"table {table}", done + stop, total)
        done += blocks


async def parts_of(pool: Pool, table: str) -> list[tuple[str, int]]:
    """The tables that hold rows, by name, and how many blocks each has."""
    async with asking(pool, LOOK_SECONDS) as connection:
        rows = await connection.fetch(
            "SELECT c.oid::regclass::text AS name, pg_relation_size(c.oid) / current_setting('block_size')::int AS blocks"
            " FROM (SELECT relid FROM pg_partition_tree($1::text::regclass) WHERE isleaf"
            "       UNION SELECT $1::text::regclass) t JOIN pg_class c ON c.oid = t.relid WHERE c.relkind = 'r'",
            table,
        )
    return [(row["name"], row["blocks"]) for row in rows]


async def _stretch(pool: Pool, statement: str, start: int, stop: int) -> list[asyncpg.Record] | None:
    """None: the table has been dropped."""
    try:
        async with asking(pool, LOOK_SECONDS) as connection:
            return await connection.fetch(statement, f"({start},0)", f"({stop},0)")
    except StoreBroken as error:
        if isinstance(error.__cause__, asyncpg.UndefinedTableError):
            return None
        raise


async def _live_version(pool: Pool, projection: str) -> int:
    async with asking(pool, LOOK_SECONDS) as connection:
        return await live_version(connection, projection)
