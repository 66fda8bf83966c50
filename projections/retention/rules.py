"""How long rows of the tables are kept: 90 days, or as long as is set for a tenant (table `retention`, ADR 0018).

Rows leave by whole months, each with the month of its `kept_until`. `Retention` decides until when a row is kept, and operators
set it through `RetentionTable`. `projections.retention.months` drops the months.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from engine.errors import InvalidSetting
from engine.postgres import Connection, Pool, asking

DAYS: Final = 90
"""Where nothing else is set; also the first row of the table."""

DAYS_MAX: Final = 400
"""A year and a month. A row is looked for in every month there is, so each further month costs every batch a little work."""

_BEGIN: Final = (
    "BEGIN; SET LOCAL lock_timeout = '4s'; SET LOCAL idle_in_transaction_session_timeout = '5s';"
    " LOCK TABLE retention IN EXCLUSIVE MODE"
)
"""Whoever folds a batch has a lock of the same table: each batch comes wholly before this, or wholly after it. While this waits,
batches that begin wait behind it. So the server ends that by itself: it does not notice that a client has left."""

EVERY_TENANT: Final = ""
"""The tenant of the row that holds for all tenants without a row of their own."""


class Kept(msgspec.Struct, frozen=True):
    """What is set for one tenant.

    Attributes:
        days: how long rows are kept; they leave at the end of that month.
        not_before: rows that are stored from now on leave no sooner than this.
    """

    days: int = DAYS
    not_before: datetime | None = None


class Retention(msgspec.Struct, frozen=True):
    """Until when rows are kept, at the moment `now` of the database.

    Attributes:
        tenants: what is set; `EVERY_TENANT` for all others.
        anew: a rebuild writes the whole table by this one rule, so `not_before` has no order to keep.
    """

    tenants: dict[str, Kept]
    now: datetime
    anew: bool = False

    def of(self, tenant: str) -> Kept:
        """What holds for a tenant."""
        return self.tenants.get(tenant) or self.tenants.get(EVERY_TENANT) or Kept()

    def kept_until(self, tenant: str, at: datetime) -> datetime:
        """Until when what was stored at `at` is kept.

        A time ahead of ours counts as now, and a row that should have left already leaves with this month: months that are
        over, or far ahead, have no table.
        """
        kept = self.of(tenant)
        until = max(min(at, self.now) + timedelta(days=kept.days), self.now)
        return until if self.anew or kept.not_before is None else max(until, kept.not_before)


async def read_retention(
    connection: Connection, tenants: Iterable[str] | None = None, *, anew: bool = False
) -> Retention:
    """What is set for these tenants, or for all."""
    named = None if tenants is None else [EVERY_TENANT, *tenants]
    rows = await connection.fetch(
        "SELECT tenant, days, not_before, clock_timestamp() AS now FROM retention"
        " WHERE $1::text[] IS NULL OR tenant = ANY($1)",
        named,
    )
    now = max((row["now"] for row in rows), default=datetime.now(UTC))
    return Retention({row["tenant"]: Kept(row["days"], row["not_before"]) for row in rows}, now, anew)


class RetentionTable:
    """How long rows are kept, as operators see and set it. Its methods raise StoreUnavailable."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def all(self) -> dict[str, Kept]:
        """What is set, by tenant."""
        async with asking(self._pool) as connection:
            return (await read_retention(connection)).tenants

    async def set(self, tenant: str, days: int) -> Kept:
        """Keep rows of `tenant` (`EVERY_TENANT`: of all without a time of their own) for `days` from now on.

        Rows that are stored already keep their time until the next rebuild. A shorter time takes effect once those have left:
        newer rows never leave before older ones, as a count can lose its oldest part but not a part in the middle.

        Raises:
            InvalidSetting: `days` is not 1 to 400.
        """
        if not 1 <= days <= DAYS_MAX:
            raise InvalidSetting(f"days must be 1 to {DAYS_MAX}, not {days}")
        async with asking(self._pool) as connection:
            await connection.execute(_BEGIN)
            # The tables of the months must be there before anybody can write to them.
            await connection.execute(
                "SELECT seamark_create_months(projection, version, $1) FROM projection_versions", days
            )
            before = await read_retention(connection, [tenant])
            kept = shortened(before.of(tenant), days, before.now)
            await connection.execute(
                "INSERT INTO retention (tenant, days, not_before) VALUES ($1, $2, $3) ON CONFLICT (tenant) DO UPDATE"
                " SET days = excluded.days, not_before = excluded.not_before, changed_at = now()",
                tenant,
                kept.days,
                kept.not_before,
            )
            await connection.execute("COMMIT")
        return kept


def shortened(before: Kept, days: int, now: datetime) -> Kept:
    """The setting that follows `before`. No row of it leaves before the rows that were stored under `before`."""
    latest = max(now + timedelta(days=before.days), before.not_before or now)
    return Kept(days, latest if latest > now + timedelta(days=days) else None)
