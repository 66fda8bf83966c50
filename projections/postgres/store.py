"""A projection's tables as its projector writes them: rows and checkpoint change in one transaction or not at all."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from engine.partition.reader import Delivered
from engine.postgres import QUERY_SECONDS, Connection, Pool, asking
from projections.postgres.versions import live, live_version, read_place
from projections.projection import Projection
from projections.retention.rules import Retention, read_retention
from projections.store import Checkpoint

APPLY_SECONDS: Final = 30.0
"""One batch; a checkpoint that another transaction holds is waited for within it, such as that of a switch."""

MONTHS_SECONDS: Final = 60.0
"""How often the tables of the months that may be written to are made; `RetentionTable.set` makes those of a longer time."""

# A batch touches a few hundred rows by their keys, whatever the statistics of a table that has just grown say. The lock
# excludes whoever sets a retention (`RetentionTable.set`): each batch is wholly under the former one or the new one.
_BEGIN: Final = (
    "BEGIN; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off;"
    " LOCK TABLE retention IN ROW SHARE MODE"
)


class TableStore(ABC):
    """A `projections.store.Store` of one partition of a projection in PostgreSQL.

    Only the transaction that moves the checkpoint of a partition adds rows of its users, and it looks for them first. So a key
    stands in a table once, although no index covers all months.

    Args:
        version: a fixed version, for a rebuild; None: whichever is live, asked at every `checkpoint`.
    """

    projection: ClassVar[Projection]

    def __init__(self, pool: Pool, partition: int, *, version: int | None = None) -> None:
        self._pool = pool
        self._partition = partition
        self._fixed = version is not None
        self._version = version or 1
        self._months: tuple[int, float] | None = None

    async def checkpoint(self) -> Checkpoint | None:
        """The stored checkpoint."""
        name, stream = self.projection.name, self.projection.stream(self._partition)
        async with asking(self._pool, QUERY_SECONDS) as connection:
            if not self._fixed:
                self._version = await live_version(connection, name)
            place = await read_place(connection, name, stream, self._partition, self._version)
        return None if place is None else place.checkpoint

    async def apply(self, batch: Sequence[Delivered], expected: Checkpoint | None, reached: Checkpoint) -> bool:
        """Fold `batch` in: one transaction, alone from the moment it moves the checkpoint."""
        await self._make_months()
        async with asking(self._pool, APPLY_SECONDS) as connection:
            await connection.execute(_BEGIN)
            era = await self._move(connection, expected, reached)
            if era is not None:
                await self._fold(connection, batch, reached.epoch, era)
            await connection.execute("COMMIT")
        return era is not None

    @abstractmethod
    async def _fold(self, connection: Connection, batch: Sequence[Delivered], epoch: str, era: int) -> None:
        """Write what a batch changes."""

    async def _retention(self, connection: Connection, tenants: set[str]) -> Retention:
        return await read_retention(connection, tenants, anew=self._fixed)

    async def _make_months(self) -> None:
        if self._months is None or self._months[0] != self._version or time.monotonic() > self._months[1]:
            async with asking(self._pool, QUERY_SECONDS) as connection:
                await connection.execute("SELECT seamark_create_months($1, $2)", self.projection.name, self._version)
            self._months = self._version, time.monotonic() + MONTHS_SECONDS

    async def _move(self, connection: Connection, expected: Checkpoint | None, reached: Checkpoint) -> int | None:
        """Move the checkpoint and hold it until the transaction ends; its era, or None when it was not as expected.

        A version that is no longer the live one does not move either: a rebuild has been switched to.
        """
        name, stream = self.projection.name, self.projection.stream(self._partition)
        where = "true" if self._fixed else f"version = {live(name)}"
        args: list[Any] = [name, self._version, stream, self._partition, *reached]
        if expected is None:
            statement = (
                "INSERT INTO projection_checkpoints (projection, version, stream, partition, epoch, seq, era)"
                " SELECT * FROM (VALUES ($1, $2::integer, $3, $4::integer, $5, $6::bigint, 1))"
                f" AS v (projection, version, stream, partition, epoch, seq, era) WHERE {where}"
                " ON CONFLICT DO NOTHING RETURNING era"
            )
        else:
            args += expected
            statement = (
                f"UPDATE projection_checkpoints SET epoch = $5, seq = $6, updated_at = now() WHERE {where}"
                " AND projection = $1 AND version = $2 AND stream = $3 AND partition = $4 AND epoch = $7 AND seq = $8"
                " RETURNING era"
            )
        era: int | None = await connection.fetchval(statement, *args)
        return era
