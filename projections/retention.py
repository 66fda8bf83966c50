"""For how long rows of the tables are kept: 90 days, or what is set for a tenant (table `retention`, ADR 0018).

A row goes with the month of its `kept_until`, whole months at a time. `Retention` decides, `Keeping` is what a store asks,
`RetentionTable` is how it is set; what drops months is `projections.months`.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from engine.errors import InvalidSetting
from projections.postgres import asking

if TYPE_CHECKING:
    from projections.postgres import Connection, Pool

DAYS: Final = 90
"""Without another word; also the first row of the table."""

DAYS_MAX: Final = 400
"""A year and a month. A row is looked for in every month there is, so each month more is a little work for every batch."""

EVERY_TENANT: Final = ""
"""The name of the row that is for all tenants without one of their own."""

REFRESH_SECONDS: Final = 60.0
"""How long what was set is believed in: a change need not reach the very next row."""

QUERY_SECONDS: Final = 5.0


class Kept(msgspec.Struct, frozen=True):
    """What is set for one tenant.

    Attributes:
        days: rows are kept for so long, and until the end of that month.
        not_before: what is stored from now on leaves no sooner than this.
    """

    days: int = DAYS
    not_before: datetime | None = None


class Retention:
    """Until when rows are kept, by tenant.

    Args:
        tenants: what is set; `EVERY_TENANT` for all others.
        anew: every row of the table is given its time by the same rule, so `not_before` has nothing to keep in order.
    """

    def __init__(self, tenants: dict[str, Kept], *, anew: bool = False) -> None:
        self._tenants = tenants
        self._other = tenants.get(EVERY_TENANT, Kept())
        self._anew = anew

    def kept_until(self, tenant: str, at: datetime, now: datetime) -> datetime:
        """Until when what was stored at `at` is kept.

        A clock that is ahead keeps nothing for longer, and what should be gone already goes with this month: months that
        are over, or that far ahead, have no table.
        """
        kept = self._tenants.get(tenant, self._other)
        until = max(min(at, now) + timedelta(days=kept.days), now)
        return until if self._anew or kept.not_before is None else max(until, kept.not_before)


class Keeping:
    """What a store asks before it writes: what is set, and that there is a table for every month it may write to.

    Args:
        projection: `inbox` or `deliveries`.
        anew: as of `Retention`.
    """

    def __init__(self, projection: str, *, anew: bool = False) -> None:
        self._projection = projection
        self._anew = anew
        self._retention = Retention({})
        self._version = 0
        self._until = 0.0

    async def of(self, pool: Pool, version: int) -> Retention:
        """What holds for rows of `version`, at most a minute old.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        if time.monotonic() >= self._until or version != self._version:
            async with asking(pool, QUERY_SECONDS) as connection:
                self._retention = Retention(await read_retention(connection), anew=self._anew)
                await connection.execute("SELECT seamark_create_months($1, $2)", self._projection, version)
            self._version, self._until = version, time.monotonic() + REFRESH_SECONDS
        return self._retention


async def read_retention(connection: Connection) -> dict[str, Kept]:
    """What is set, by tenant."""
    rows = await connection.fetch("SELECT tenant, days, not_before FROM retention")
    return {row["tenant"]: Kept(row["days"], row["not_before"]) for row in rows}


class RetentionTable:
    """How long rows are kept, as operators see and set it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def all(self) -> dict[str, Kept]:
        """What is set, by tenant.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        async with asking(self._pool, QUERY_SECONDS) as connection:
            return await read_retention(connection)

    async def set(self, tenant: str, days: int) -> Kept:
        """Keep rows of `tenant` (`EVERY_TENANT`: of all without a time of their own) for `days` from now on.

        Rows that are stored keep their time until the next rebuild. A shorter time takes effect when those have left: newer
        rows never leave before older ones, for a count without its oldest part is right and one with a hole is not.

        Raises:
            InvalidSetting: `days` is not 1 to 400.
            StoreUnavailable: PostgreSQL does not answer.
        """
        if not 1 <= days <= DAYS_MAX:
            raise InvalidSetting(f"days must be 1 to {DAYS_MAX}, not {days}")
        async with asking(self._pool, QUERY_SECONDS) as connection, connection.transaction():
            await connection.execute("LOCK TABLE retention IN SHARE ROW EXCLUSIVE MODE")
            # Before anybody can write to them.
            await connection.execute(
                "SELECT seamark_create_months(projection, version, $1) FROM projection_versions"
                " WHERE projection IN ('inbox', 'deliveries')",
                days,
            )
            before = await read_retention(connection)
            kept = shortened(before.get(tenant) or before.get(EVERY_TENANT, Kept()), days, datetime.now(UTC))
            await connection.execute(
                "INSERT INTO retention (tenant, days, not_before) VALUES ($1, $2, $3) ON CONFLICT (tenant) DO UPDATE"
                " SET days = excluded.days, not_before = excluded.not_before, changed_at = now()",
                tenant,
                kept.days,
                kept.not_before,
            )
        return kept


def shortened(before: Kept, days: int, now: datetime) -> Kept:
    """`before`, with another number of days: nothing leaves before what was stored under the former one."""
    latest = max(now + timedelta(days=before.days), before.not_before or now)
    return Kept(days, latest if latest > now + timedelta(days=days) else None)
