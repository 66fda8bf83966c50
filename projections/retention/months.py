"""Drops the months of the tables that are over, and takes what was in them off the unread counts (ADR 0018).

A month is taken out of what is read in a moment; then it is read once for what no longer counts, and dropped.

A row goes when its month is over *and* the log no longer holds its record, nor a repetition of it (ADR 0031). So whatever is
set, a projection holds all that can be folded, and `verify`, counts and pages agree; where retention is shorter than the age of
the log, that age holds.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import structlog
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.errors import BrokerError, StoreUnavailable, TopologyError
from engine.postgres import AWAY, Connection, Pool, asking, holding
from projections import metrics
from projections.postgres.versions import leaves, live_version, take_away
from projections.projection import DELIVERIES, IN_TABLES, INBOX, REPEATED, Projection
from projections.retention.counts import forget_counts, forget_former, write_left
from projections.retention.rules import DAYS
from projections.unread.store import WEIGHT_MAX, UnreadStore
from seamark.protocol.subjects import encode_token, partition_of

_log = structlog.get_logger("seamark.retention")

EVERY_SECONDS: Final = 600.0
"""A month ends once a month; but what could not be dropped, because somebody was reading, is tried again soon."""

KEEP_LOCK: Final = 7345255
"""Of all projectors the one that holds this lock drops months."""

SCAN_SECONDS: Final = 1800.0
"""To read one month: of 500 million rows in four months one has 125 million, which are read in some minutes."""

ROUND_SECONDS: Final = 4 * 3600.0
"""All of one round; after that something hangs, and another projector may try."""

SLACK: Final = timedelta(minutes=5)
"""What clocks of gateways, projectors, leaders of a stream and the database differ by."""

CURSORS_EVERY: Final = timedelta(days=1)
CURSOR_BLOCKS: Final = 10_000
"""Blocks of `device_cursors` looked through by one statement: 80 MB, a second."""

_NAME: Final = re.compile(r".*_(\d{4})(\d{2})")


class Month(NamedTuple):
    """A month of one version of a projection: its name in tables (`202703`), and the moment in which it is over."""

    name: str
    over_at: datetime


class Months:
    """Keeps the months of all tables."""

    def __init__(self, broker: Broker, redis: Redis, pool: Pool, partitions: int) -> None:
        self._broker = broker
        self._redis = redis
        self._pool = pool
        self._partitions = partitions
        self._cursors_at: datetime | None = None

    async def run(self) -> None:
        """Keep them for ever; ends by cancellation. What fails is said, and tried again."""
        while True:
            try:
                async with asyncio.timeout(ROUND_SECONDS), holding(self._pool, KEEP_LOCK) as mine:
                    if mine is not None:
                        await self.keep()
                        metrics.retention_kept_at.set(time.time())
                    else:
                        _say_nothing()
            except (BrokerError, TopologyError, StoreUnavailable, *AWAY) as error:
                _log.warning("months_not_kept", why=str(error)[:200] or type(error).__name__)
            except Exception:
                # Without this task nothing leaves the tables any more; what we did not foresee must not end it.
                _log.exception("months_not_kept")
            await asyncio.sleep(EVERY_SECONDS)

    async def keep(self, now: datetime | None = None) -> list[str]:
        """Drop what is over; the names of the months that were dropped.

        Raises:
            StoreUnavailable, BrokerError: it could not be told what is over, or dropped; ask again.
        """
        dropped: list[str] = []
        for projection in IN_TABLES.values():
            name = projection.name
            async with asking(self._pool) as connection:
                version = await live_version(connection, name)
                await connection.execute("SELECT seamark_create_months($1, $2)", name, version)
                names = await leaves(connection, f"{name}_{version}")
                # Two clocks must agree: of one that is wrong by a year all history would be gone.
                clock = now or min(datetime.now(UTC), await connection.fetchval("SELECT now()"))
            months = sorted(month for part in names if (month := month_of(part)) is not None)
            metrics.retention_undivided.labels(name).set(0 if months else 1)
            if not months:
                remedy = (
                    f"run `seamark rebuild {name}`: it divides the tables by months, until then nothing leaves them"
                )
                _log.warning("tables_not_divided", projection=name, remedy=remedy)
            overdue = 0.0
            # What is being written to it at the last moment, by a clock that is late perhaps, is in it by then.
            for month in (one for one in months if one.over_at + SLACK <= clock):
                why = await self._take_month(projection, version, month)
                if why:
                    _log.warning("month_not_dropped", projection=name, month=month.name, why=why)
                    overdue = 0.0 if why == REPEATED else (clock - month.over_at).total_seconds()
                    break  # newer rows never leave before older ones: one sequence says what no longer counts
            metrics.retention_overdue.labels(name).set(overdue)
            dropped += await self._drop_detached(projection)
        await self._forget_devices(now or datetime.now(UTC))
        return dropped

    async def _take_month(self, projection: Projection, version: int, month: Month) -> str:
        """Take a month out of what is read; if it cannot be, why."""
        parts = {f"{table.name}_{version}_{month.name}": table for table in projection.tables if table.by_months}
        horizon = await self._horizon(projection)
        if horizon is not None:
            async with asking(self._pool, SCAN_SECONDS) as connection:
                for part, where, why in (
                    (part, *need) for part, table in parts.items() for need in table.needed.items()
                ):
                    # After an election times go back by what leaders' clocks differ: the oldest record is not the earliest.
                    statement = f"SELECT EXISTS (SELECT FROM {part} WHERE {where})"
                    if await connection.fetchval(statement, horizon - SLACK):
                        return why
        return "" if await self._take_out([*parts], projection, version) else "it is being read, by a backup perhaps"

    async def _take_out(self, parts: list[str], projection: Projection = INBOX, version: int = 1) -> bool:
        async def detach(connection: Connection) -> bool:
            # A switch to another version waits, and sees then that a month has gone (`Carrying.check_months`).
            live = "SELECT version FROM projection_versions WHERE projection = $1 FOR SHARE"
            if await connection.fetchval(live, projection.name) != version:
                return False
            for part in parts:
                await connection.execute(f"ALTER TABLE {part.rpartition('_')[0]} DETACH PARTITION {part}")
            return True

        return await take_away(self._pool, detach)

    async def _drop_detached(self, projection: Projection) -> list[str]:
        """Drop what was taken out, now or by somebody who died; what is in it no longer counts."""
        dropped = []
        for table in projection.tables:
            async with asking(self._pool) as connection:
                rows = await connection.fetch(
                    "SELECT c.relname FROM pg_class c WHERE c.relkind = 'r' AND c.relname ~ $1"
                    " AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = c.oid) ORDER BY 1",
                    f"^{table.name}_[0-9]+_[0-9]{{6}}$",
                )
            for part in (row["relname"] for row in rows):
                if projection is INBOX:
                    await self._forget_counts(part)
                async with asking(self._pool, 60.0) as connection:
                    await connection.execute(f"DROP TABLE {part}")
                dropped.append(part)
                metrics.retention_dropped.labels(projection.name).inc()
                _log.info("month_dropped", projection=projection.name, table=part)
        return dropped

    async def _horizon(self, projection: Projection) -> datetime | None:
        """When the oldest message that there is was stored."""
        found = [
            await self._broker.leader_next(projection.stream(p), projection.subject(p), 1)
            for p in range(self._partitions)
        ]
        return min((datetime.fromisoformat(one.time) for one in found if one is not None), default=None)

    async def _forget_counts(self, part: str) -> None:
        """What has left the inbox no longer counts. The table goes afterwards: who dies in between begins again here."""
        async with asking(self._pool, SCAN_SECONDS) as connection:
            rows = await connection.fetch(f"SELECT epoch, tenant, max(seq) AS seq FROM {part} GROUP BY epoch, tenant")
        floors: dict[str, dict[str, int]] = defaultdict(dict)
        for row in rows:
            floors[row["epoch"]][encode_token(row["tenant"])] = row["seq"]
        await write_left(self._redis, floors)
        for p in range(self._partitions):
            await forget_counts(self._redis, p, floors)
        await self._forget_former(part, set(floors))

    async def _forget_former(self, part: str, epochs: set[str]) -> None:
        """Of former incarnations of a log nobody but the table knows which sequences a version of the counts gave them."""
        stores = [UnreadStore(self._redis, p) for p in range(self._partitions)]
        counted = {at.epoch for at in [await store.checkpoint() for store in stores] if at is not None}
        if not epochs - counted:
            return
        where = "NOT epoch = ANY($1::text[])"
        async with asking(self._pool, SCAN_SECONDS) as connection, connection.transaction():
            rows = await connection.cursor(f"SELECT tenant, user_id, id FROM {part} WHERE {where}", list(counted))
            while page := await rows.fetch(WEIGHT_MAX):
                found: dict[int, dict[str, list[str]]] = {}
                for row in page:
                    tenant, user = encode_token(row["tenant"]), encode_token(row["user_id"])
                    users = found.setdefault(partition_of(tenant, user, self._partitions), {})
                    users.setdefault(f"{tenant}.{user}", []).append(row["id"])
                for p, users in found.items():
                    await forget_former(self._redis, p, users)

    async def _forget_devices(self, now: datetime) -> None:
        """Cursors of devices that were silent for as long as rows are kept: what they could resume is gone."""
        if self._cursors_at is not None and now < self._cursors_at + CURSORS_EVERY:
            return
        horizon = await self._horizon(DELIVERIES)
        async with asking(self._pool) as connection:
            size = await connection.fetchval("SELECT pg_relation_size('device_cursors')")
        blocks = size // 8192 + 1
        for block in range(0, blocks, CURSOR_BLOCKS):
            async with asking(self._pool, SCAN_SECONDS) as connection:
                await connection.execute(
                    "DELETE FROM device_cursors c"
                    f" WHERE c.ctid >= '({block},0)'::tid AND c.ctid < '({block + CURSOR_BLOCKS},0)'::tid AND c.touched_at <"
                    " $1::timestamptz - interval '1 day' * coalesce((SELECT days FROM retention r WHERE r.tenant = c.tenant),"
                    f" (SELECT days FROM retention WHERE tenant = ''), {DAYS}) AND c.touched_at < $2",
                    now,
                    now if horizon is None else horizon - SLACK,  # what can be folded is there
                )
        self._cursors_at = now


def _say_nothing() -> None:
    """Another projector tells; what this one saw last would be told for ever."""
    metrics.retention_overdue.clear()
    metrics.retention_undivided.clear()
    metrics.retention_kept_at.set(0)


def month_of(part: str) -> Month | None:
    """The month whose rows a table has, by its name; None: it is not one of a month."""
    found = _NAME.fullmatch(part)
    if found is None or not 1 <= int(found[2]) <= 12:
        return None
    year, month = int(found[1]), int(found[2])
    over = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
    return Month(f"{found[1]}{found[2]}", over)
