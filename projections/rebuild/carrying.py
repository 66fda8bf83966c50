"""Copies into a new version of the tables what the streams no longer hold: rows that cannot be folded anew (ADR 0018).

One pass over the live version, a day at a time: PostgreSQL copies, so memory is bounded whatever there is, each day is one
transaction, and a day whose outcome is unknown is copied again. A BRIN index on the time finds the rows of a day.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from engine.errors import TopologyError
from engine.patience import patiently
from engine.postgres import Connection, Pool, asking
from projections.postgres.versions import leaves
from projections.projection import Projection, Table
from projections.rebuild.folding import Horizon
from projections.replay import Progress
from projections.retention.rules import DAYS, DAYS_MAX

SLACK: Final = timedelta(minutes=5)
"""Receipts carry the clock of a gateway: around the horizon they are both carried and folded, which changes nothing."""

CLOCKS: Final = timedelta(hours=1)
"""Records are stored in the order of their sequences, and their times go back by what the clocks of leaders differ."""

CARRY_SECONDS: Final = 3600.0
"""One statement. A day of 500 million rows in 120 days is four million: a minute or two. A table that is copied in one piece
(deliveries of channels, cursors of devices) may hold more."""

SMALL_BYTES: Final = 256 << 20
"""What is smaller is copied at once: some hundred looks for its days would take longer."""

WINDOW: Final = timedelta(days=1)
OLDEST: Final = timedelta(days=DAYS_MAX + 62)
"""No row of a version of months is older. In a version without them there may be some: they are copied first."""

FIRST: Final = datetime(1, 1, 1, tzinfo=UTC)
LAST: Final = datetime(9999, 12, 31, tzinfo=UTC)
"""Around all times that a table may hold (`projections.folds.inbox.zoned`)."""


class Carrying:
    """Copies from version `live` to version `new`, which nobody reads yet. Its methods wait for PostgreSQL, but not for ever.

    Args:
        tenant: only this tenant's rows.
        progress: told now and then.
    """

    def __init__(
        self, pool: Pool, projection: Projection, live: int, new: int, tenant: str | None, progress: Progress
    ) -> None:
        self._pool = pool
        self._projection = projection
        self._live = live
        self._new = new
        self._tenant = tenant
        self._progress = progress
        self._began = datetime.now(UTC)
        self._months: set[str] = set()
        self.rows = 0

    async def records(self, horizons: Sequence[Horizon], *, formerly: bool) -> None:
        """Rows of records before the horizons, and with `formerly` those of epochs that have none."""
        times = [one.at for one in horizons]
        newest = None if formerly else max((at for at in times if at is not None), default=None)
        until = LAST if newest is None or None in times else newest + CLOCKS
        self._months = await patiently(self._read_months)
        for table in self._projection.tables:
            async for since, to in self._windows(table, until):
                await self._before(table, horizons, since, to, formerly=formerly)

    async def gap(self, horizon: Horizon, first: int, at: datetime) -> None:
        """Rows of the records that age has taken since the horizon was looked at: the first one read is `first`."""
        if first > horizon.oldest:
            since = (horizon.at or at) - CLOCKS
            for table in self._projection.tables:
                await self._before(table, [Horizon(horizon.epoch, first, at)], since, at + CLOCKS)

    async def _before(
        self, table: Table, horizons: Sequence[Horizon], since: datetime, to: datetime, *, formerly: bool = False
    ) -> None:
        # A log that was trimmed while this ran gives rows that are copied already: the key of their month passes over them.
        await self._copy(
            table,
            f"i.{table.at} >= $2 AND i.{table.at} < $3 AND (i.seq < h.oldest OR h.epoch IS NULL AND {formerly})",
            since,
            to,
            [one.epoch for one in horizons],
            [one.oldest for one in horizons],
            join="LEFT JOIN unnest($4::text[], $5::bigint[]) AS h (epoch, oldest) ON h.epoch = i.epoch",
        )

    async def receipts(self, oldest: datetime | None) -> None:
        """Rows of receipts that were given before the oldest there is; None: there is none, and all is copied."""
        until = LAST if oldest is None else oldest + SLACK
        for table in self._projection.tables:
            if table.moves:
                # In one statement, which sees one moment: between two a row could change places.
                await self._copy(table, f"{table.earliest} < $2", until)
            else:
                async for since, to in self._windows(table, until):
                    await self._copy(table, f"i.{table.at} >= $2 AND i.{table.at} < $3", since, to)

    async def check_months(self, connection: Connection) -> None:
        """Has a month left since it was copied? What was in it would stand in the list again, and no longer count.

        What goes until the end of the transaction waits for it, and then looks which version is the live one.

        Raises:
            TopologyError: one has.
        """
        name = self._projection.name
        await connection.execute("SELECT FROM projection_versions WHERE projection = $1 FOR UPDATE", name)
        if self._months - set(await leaves(connection, f"{name}_{self._live}")):
            raise TopologyError(f"a month has left {name} while it was rebuilt", "Run the rebuild again.")

    async def _read_months(self) -> set[str]:
        async with asking(self._pool) as connection:
            return set(await leaves(connection, f"{self._projection.name}_{self._live}"))

    async def _windows(self, table: Table, until: datetime) -> AsyncIterator[tuple[datetime, datetime]]:
        """The pieces in which a table is copied, oldest first."""

        async def measure() -> int:
            async with asking(self._pool, 60.0) as connection:
                tree = "SELECT sum(pg_table_size(relid)) FROM pg_partition_tree($1::regclass) WHERE isleaf"
                return int(await connection.fetchval(tree, f"{table.name}_{self._live}") or 0)

        starts, at = [FIRST], self._began - OLDEST
        if await patiently(measure) >= SMALL_BYTES:
            while at < min(self._began, until):
                starts.append(at)
                at += WINDOW
        for number, window in enumerate(zip(starts, [*starts[1:], until], strict=True), 1):
            yield window
            self._progress(f"{table.name} carried over", number, len(starts))

    async def _copy(self, table: Table, where: str, *args: object, join: str = "") -> None:
        """Copy the rows `i` of a table for which `where` holds. `args` are its parameters from $2 on."""
        values = {**{name: f"i.{name}" for name in table.columns}, **table.beside, "version": str(self._new)}
        if table.by_months:  # as `Retention.kept_until` has it, anew
            days = f"coalesce(r.days, (SELECT days FROM retention WHERE tenant = ''), {DAYS}) * interval '1 day'"
            now = f"'{self._began.isoformat()}'::timestamptz"
            values["kept_until"] = f"greatest(least(i.{table.at}, {now}) + {days}, {now})"
        statement = (
            f"INSERT INTO {table.name} ({', '.join(values)}) SELECT {', '.join(values.values())} FROM {table.name} i"
            f" LEFT JOIN retention r ON r.tenant = i.tenant {join}"
            f" WHERE i.version = {self._live} AND ($1::text IS NULL OR i.tenant = $1) AND {where} ON CONFLICT DO NOTHING"
        )

        async def copy() -> int:
            async with asking(self._pool, CARRY_SECONDS) as connection:
                return int((await connection.execute(statement, self._tenant, *args)).rsplit(" ", 1)[1])

        self.rows += await patiently(copy)
