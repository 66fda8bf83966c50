"""How long rows of the tables are kept: 90 days, or as long as is set for a tenant (table `retention`, ADR 0018).

Rows leave by whole months, each with the month of its `kept_until`. `Retention` decides until when a row is kept, a store asks
`RetentionCache`, and operators set it through `RetentionTable`. `projections.retention.months` drops the months.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from engine.errors import InvalidSetting
from projections.postgres.versions import asking

if TYPE_CHECKING:
    from projections.postgres.versions import Connection, Pool

DAYS: Final = 90
"""Where nothing else is set; also the first row of the table."""

DAYS_MAX: Final = 400
"""A year and a month. A row is looked for in every month there is, so each further month costs every batch a little work."""

EVERY_TENANT: Final = ""
"""The tenant of the row that holds for all tenants without a row of their own."""

REFRESH_SECONDS: Final = 60.0
"""How long a setting that was read is used: a change need not reach the very next row."""

QUERY_SECONDS: Final = 5.0


class Kept(msgspec.Struct, frozen=True):
    """What is set for one tenant.

    Attributes:
        days: how long rows are kept; they leave at the end of that month.
        not_before: rows that are stored from now on leave no sooner than this.
    """

    days: int = DAYS
    not_before: datetime | None = None


class Retention:
    """Until when rows are kept, by tenant.

    Args:
        tenants: what is set; `EVERY_TENANT` for all others.
        anew: a rebuild writes the whole table by this one rule, so `not_before` has no order to keep.
    """

    def __init__(self, tenants: dict[str, Kept], *, anew: bool = False) -> None:
        self._tenants = tenants
        self._other = tenants.get(EVERY_TENANT, Kept())
        self._anew = anew

    def kept_until(self, tenant: str, at: datetime, now: datetime) -> datetime:
        """Until when what was stored at `at` is kept.

        A time ahead of ours counts as now, and a row that should have left already leaves with this month: months that are
        over, or far ahead, have no table.
        """
        kept = self._tenants.get(tenant, self._other)
        until = max(min(at, now) + timedelta(days=kept.days), now)
        return until if self._anew or kept.not_before is None else max(until, kept.not_before)


class RetentionCache:
    """What a store asks before it writes. It knows what is set, and makes the tables of the months that may be written to.

    Args:
        projection: `inbox` or `deliveries`.
        anew: see `Retention`.
    """

    def __init__(self, projection: str, *, anew: bool = False) -> None:
        self._projection = projection
        self._anew = anew
        self._retention = Retention({})
        self._version = 0
        self._until = 0.0

    async def of(self, pool: Pool, version: int) -> Retention:
        """The retention for rows of `version`, as it was set at most a minute ago.

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
    """The settings, by tenant."""
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

        Rows that are stored already keep their time until the next rebuild. A shorter time takes effect once those have left:
        newer rows never leave before older ones, as a count can lose its oldest part but not a part in the middle.

        Raises:
            InvalidSetting: `days` is not 1 to 400.
            StoreUnavailable: PostgreSQL does not answer.
        """
        if not 1 <= days <= DAYS_MAX:
            raise InvalidSetting(f"days must be 1 to {DAYS_MAX}, not {days}")
        async with asking(self._pool, QUERY_SECONDS) as connection, connection.transaction():
            await connection.execute("LOCK TABLE retention IN SHARE ROW EXCLUSIVE MODE")
            # The tables of the months must be there before anybody can write to them.
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
    """The setting that follows `before`. No row of it leaves before the rows that were stored under `before`."""
    latest = max(now + timedelta(days=before.days), before.not_before or now)
    return Kept(days, latest if latest > now + timedelta(days=days) else None)
