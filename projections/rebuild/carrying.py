"""Copies into a new version of the tables what the streams no longer hold: rows that cannot be folded anew (ADR 0018).

One pass over the live version, a day at a time: PostgreSQL copies, so memory is bounded whatever there is, each day is one
transaction, and a day whose outcome is unknown is copied again. A BRIN index on the time finds the rows of a day.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from engine.errors import TopologyError
from projections.deliveries.table import EARLIEST
from projections.folds.inbox import Row
from projections.postgres.patience import patiently
from projections.postgres.versions import asking
from projections.retention.rules import DAYS, DAYS_MAX

if TYPE_CHECKING:
    from projections.postgres.versions import Connection, Pool

INBOX_COLUMNS: Final = tuple(Row.__dataclass_fields__)
DELIVERY_COLUMNS: Final = (
    "tenant", "user_id", "id", "channel", "device", "rank", "state", "reason", "provider", "trace", "at", "attempts",
    "sent_at", "delivered_at", "acknowledged_at", "seen_at", "read_at",
)  # fmt: skip
RANGE_COLUMNS: Final = (
    "tenant", "user_id", "device", "channel", "state", "epoch", "after_seq", "up_to", "at", "sent_at",
)  # fmt: skip
CURSOR_COLUMNS: Final = ("tenant", "user_id", "device", "epoch", "seq", "at", "touched_at")

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
"""Around all times that a table may hold (`inbox_fold.zoned`)."""


class Horizon(NamedTuple):
    """Where the log of a partition begins: what is before `oldest` in `epoch` cannot be folded.

    Attributes:
        oldest: the first sequence that will be folded.
        at: when it was stored; None: the log holds nothing.
    """

    epoch: str
    oldest: int
    at: datetime | None


Carried = Callable[[int, int], None]
"""`carried(done, total)`: days that were copied, and all there are."""


class Carrying:
    """Copies from version `live` to version `new`, which nobody reads yet.

    Args:
        tenant: only this tenant's rows.
        progress: told now and then.
    """

    def __init__(
        self, pool: Pool, live: int, new: int, *, tenant: str | None = None, progress: Carried | None = None
    ) -> None:
        self._pool = pool
        self._live = live
        self._new = new
        self._tenant = tenant
        self._progress = progress
        self._began = datetime.now(UTC)
        self._months: set[str] = set()
        self.rows = 0

    async def inbox(self, horizons: Sequence[Horizon], *, formerly: bool) -> None:
        """Rows before the horizons, and with `formerly` those of epochs that have none.

        Raises:
            StoreUnavailable: PostgreSQL was away for long.
        """
        times = [one.at for one in horizons]
        newest = None if formerly else max((at for at in times if at is not None), default=None)
        until = None if newest is None or None in times else newest + CLOCKS
        before = "(h.epoch IS NULL OR i.seq < h.oldest)" if formerly else "i.seq < h.oldest"
        self._months = await patiently(self._read_months)
        windows = await self._windows("inbox", until)
        for number, (since, to) in enumerate(windows):
            self._tell(number, len(windows))
            await self._inbox(horizons, before, since, to)
        self._tell(len(windows), len(windows))

    async def check_months(self, connection: Connection) -> None:
        """Has a month left the inbox since it was copied? It would stand in the list again, and no longer count.

        What goes until the end of the transaction waits for it, and then looks which version is the live one.

        Raises:
            TopologyError: one has.
        """
        await connection.execute("SELECT FROM projection_versions WHERE projection = 'inbox' FOR UPDATE")
        if self._months - await _months(connection, self._live):
            raise TopologyError("a month has left the inbox while it was rebuilt", "Run the rebuild again.")

    async def _read_months(self) -> set[str]:
        async with asking(self._pool, 60.0) as connection:
            return await _months(connection, self._live)

    async def gap(self, horizon: Horizon, first: int, at: datetime) -> None:
        """Rows of the records that age has taken since the horizon was looked at: the first one read is `first`.

        Raises:
            StoreUnavailable: PostgreSQL was away for long.
        """
        if first > horizon.oldest:
            since = (horizon.at or at) - CLOCKS
            await self._inbox([Horizon(horizon.epoch, first, at)], "i.seq < h.oldest", since, at + CLOCKS)

    async def _inbox(self, horizons: Sequence[Horizon], before: str, since: datetime, to: datetime) -> None:
        # A log that was trimmed while this ran gives rows that are copied already: the key of their month passes over them.
        columns = ", ".join(INBOX_COLUMNS)
        await self._copy(
            f"INSERT INTO inbox_{self._new} ({columns}, carried, kept_until, version)"
            f" SELECT {_of('i', INBOX_COLUMNS)}, true, {_kept('i.stored_at')}, {self._new} FROM inbox_{self._live} i"
            " LEFT JOIN unnest($4::text[], $5::bigint[]) AS h (epoch, oldest) ON h.epoch = i.epoch"
            " LEFT JOIN retention r ON r.tenant = i.tenant"
            " WHERE i.stored_at >= $1 AND i.stored_at < $2 AND ($6::text IS NULL OR i.tenant = $6)"
            f" AND {before} ON CONFLICT DO NOTHING",
            since,
            to,
            self._began,
            [one.epoch for one in horizons],
            [one.oldest for one in horizons],
            self._tenant,
        )

    async def deliveries(self, oldest: datetime | None) -> None:
        """What was told before the oldest receipt there is; None: there is none, and all is copied.

        Raises:
            StoreUnavailable: PostgreSQL was away for long.
        """
        until = LAST if oldest is None else oldest + SLACK
        windows = await self._windows("delivery_ranges", until)
        for number, (since, to) in enumerate(windows):
            self._tell(number, len(windows) + 2)
            await self._copy(
                f"INSERT INTO delivery_ranges_{self._new} ({', '.join(RANGE_COLUMNS)}, kept_until, version)"
                f" SELECT {_of('i', RANGE_COLUMNS)}, {_kept('i.at')}, {self._new} FROM delivery_ranges_{self._live} i"
                " LEFT JOIN retention r ON r.tenant = i.tenant"
                " WHERE i.at >= $1 AND i.at < $2 AND ($4::text IS NULL OR i.tenant = $4) ON CONFLICT DO NOTHING",
                since,
                to,
                self._began,
                self._tenant,
            )
        self._tell(len(windows), len(windows) + 2)
        # Rows that receipts change are copied in one statement, which sees one moment: between two they could change places.
        await self._copy(
            f"INSERT INTO deliveries_{self._new} ({', '.join(DELIVERY_COLUMNS)}, kept_until, version)"
            f" SELECT {_of('i', DELIVERY_COLUMNS)}, {_kept('i.at', '$2')}, {self._new} FROM deliveries_{self._live} i"
            f" LEFT JOIN retention r ON r.tenant = i.tenant WHERE {EARLIEST['deliveries']} < $1"
            " AND ($3::text IS NULL OR i.tenant = $3) ON CONFLICT DO NOTHING",
            until,
            self._began,
            self._tenant,
        )
        await self._copy(
            f"INSERT INTO device_cursors ({', '.join(CURSOR_COLUMNS)}, version)"
            f" SELECT {', '.join(CURSOR_COLUMNS)}, {self._new} FROM device_cursors"
            f" WHERE version = {self._live} AND {EARLIEST['device_cursors']} < $1 AND ($2::text IS NULL OR tenant = $2)"
            " ON CONFLICT DO NOTHING",
            until,
            self._tenant,
        )
        self._tell(len(windows) + 2, len(windows) + 2)

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)

    async def _windows(self, table: str, until: datetime | None) -> list[tuple[datetime, datetime]]:
        """The pieces in which a table is copied, oldest first. `until` None: to its end."""

        async def measure() -> int:
            async with asking(self._pool, 60.0) as connection:
                tree = "SELECT sum(pg_table_size(relid)) FROM pg_partition_tree($1::regclass) WHERE isleaf"
                return int(await connection.fetchval(tree, f"{table}_{self._live}") or 0)

        end = until or LAST
        if await patiently(measure) < SMALL_BYTES:
            return [(FIRST, end)]
        starts, at = [FIRST], self._began - OLDEST
        while at < min(self._began, end):
            starts.append(at)
            at += WINDOW
        return list(zip(starts, [*starts[1:], end], strict=True))

    async def _copy(self, statement: str, *args: object) -> None:
        async def copy() -> int:
            async with asking(self._pool, CARRY_SECONDS) as connection:
                return int((await connection.execute(statement, *args)).rsplit(" ", 1)[1])

        self.rows += await patiently(copy)


async def _months(connection: Connection, version: int) -> set[str]:
    rows = await connection.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = to_regclass($1)", f"inbox_{version}"
    )
    return {row["name"] for row in rows}


def _of(alias: str, columns: Sequence[str]) -> str:
    return ", ".join(f"{alias}.{column}" for column in columns)


def _kept(at: str, now: str = "$3") -> str:
    """As `Retention.kept_until` has it, anew."""
    days = f"coalesce(r.days, (SELECT days FROM retention WHERE tenant = ''), {DAYS}) * interval '1 day'"
    return f"greatest(least({at}, {now}::timestamptz) + {days}, {now}::timestamptz)"
