"""How far notifications come: emitted → stored → dispatched → sent → acknowledged → read, by tenant, type and channel.

The funnel follows those that were dispatched within a window, whenever the later steps happened, so that each step is a part
of the one before it. As a query for whoever asks, and as gauges of the last hour for the largest tenants.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

import structlog

from engine.errors import BrokerError, StoreUnavailable
from engine.outages import postgres_failure
from engine.postgres import AWAY, Connection, Pool, asking, holding
from projections import metrics
from projections.funnel.cohorts import STAGES, Cohorts, Step
from projections.postgres.versions import live

_log = structlog.get_logger("seamark.funnel")

FUNNEL_SECONDS: Final = 20.0
"""One funnel: it looks at every notification of the window."""

EVERY_SECONDS: Final = 60.0
EXPORT_LOCK: Final = 7345253
"""Only the process that holds this lock counts: all others would count the same cohorts."""

TENANTS_MAX: Final = 20
TYPES_MAX: Final = 50
"""Values of a label: the largest by name, all others as `other`."""

# Ranges of a user become one multirange, so that a notification finds its own by one look.
_FUNNEL: Final = f"""
WITH ranges AS (
    SELECT tenant, user_id, epoch,
           range_agg(int8range(after_seq + 1, up_to + 1)) AS sent,
           range_agg(int8range(after_seq + 1, up_to + 1)) FILTER (WHERE state = 'acknowledged') AS acknowledged
    FROM delivery_ranges
    WHERE version = {live("deliveries")}
      AND channel = 'inapp' AND at >= $1::timestamptz - interval '5 minutes' AND ($3::text IS NULL OR tenant = $3)
    GROUP BY tenant, user_id, epoch
), planned AS (
    SELECT i.tenant, i.user_id, i.id, i.type, c.channel, i.epoch, i.seq, i.event_epoch, i.event_seq, i.read_seq
    FROM inbox i CROSS JOIN LATERAL unnest(i.channels) AS c (channel)
    WHERE i.version = {live("inbox")}
      AND i.stored_at >= $1 AND i.stored_at < $2 AND ($3::text IS NULL OR i.tenant = $3)
)
SELECT p.tenant, coalesce(p.type, '') AS type, p.channel,
       count(DISTINCT (p.event_epoch, p.event_seq)) FILTER (WHERE p.event_seq IS NOT NULL) AS emitted,
       count(*) AS dispatched,
       count(*) FILTER (WHERE CASE p.channel WHEN 'inapp' THEN r.sent @> p.seq ELSE d.sent END) AS sent,
       count(*) FILTER (WHERE CASE p.channel WHEN 'inapp' THEN r.acknowledged @> p.seq ELSE d.arrived END) AS acknowledged,
       count(*) FILTER (WHERE CASE p.channel WHEN 'inapp' THEN p.read_seq IS NOT NULL ELSE d.read END) AS read
FROM planned p
LEFT JOIN ranges r ON p.channel = 'inapp' AND r.tenant = p.tenant AND r.user_id = p.user_id AND r.epoch = p.epoch
LEFT JOIN LATERAL (
    SELECT bool_or(sent_at IS NOT NULL OR state IN ('delivered', 'acknowledged', 'seen', 'read')) AS sent,
           bool_or(state IN ('delivered', 'acknowledged', 'seen', 'read')) AS arrived, bool_or(state = 'read') AS read
    FROM deliveries
    WHERE version = {live("deliveries")}
      AND tenant = p.tenant AND user_id = p.user_id AND id = p.id AND channel = p.channel
) d ON p.channel <> 'inapp'
GROUP BY p.tenant, p.type, p.channel
ORDER BY p.tenant, p.type, p.channel
"""


async def funnel(pool: Pool, since: datetime, until: datetime, tenant: str | None = None) -> list[Step]:
    """The funnel of what was dispatched in [since, until).

    Raises:
        StoreUnavailable: no answer in time.
    """
    async with asking(pool, FUNNEL_SECONDS) as connection:
        return await _steps(connection, since, until, tenant)


async def _steps(connection: Connection, since: datetime, until: datetime, tenant: str | None = None) -> list[Step]:
    rows = await connection.fetch(_FUNNEL, since, until, tenant)
    return [Step(**{**dict(row), "stored": row["emitted"]}) for row in rows]


Folded = Callable[[], Awaitable[datetime]]
"""`folded()`: the moment before which everything that was stored is in the tables."""


async def export(pool: Pool, folded: Folded) -> None:
    """Keep the gauges of the last hour in one of all processes; ends by cancellation."""
    while True:
        try:
            await _export_alone(pool, folded)
        except (BrokerError, StoreUnavailable, *AWAY) as error:
            _log.warning("funnel_not_read", why=str(postgres_failure(error) if isinstance(error, AWAY) else error))
            show([])  # another process may tell them now
        await asyncio.sleep(EVERY_SECONDS)


async def _export_alone(pool: Pool, folded: Folded) -> None:
    """Returns when another process does it."""
    cohorts = Cohorts()
    async with holding(pool, EXPORT_LOCK) as connection:
        while connection is not None:
            async with asyncio.timeout(FUNNEL_SECONDS):
                now = min(await folded(), await connection.fetchval("SELECT now()"))
            for since, until in cohorts.due(now):
                async with asyncio.timeout(FUNNEL_SECONDS):
                    cohorts.add(until, await _steps(connection, since, until))
            show(cohorts.total())
            await asyncio.sleep(EVERY_SECONDS)


def show(steps: list[Step]) -> None:
    """Set the gauges. Labels stay few: the largest tenants and types by name, all others together."""
    tenants, types = Counter[str](), Counter[str]()
    for step in steps:
        tenants[step.tenant] += step.dispatched
        types[step.type] += step.dispatched
    named = {name for name, _ in tenants.most_common(TENANTS_MAX)}, {name for name, _ in types.most_common(TYPES_MAX)}
    totals: Counter[tuple[str, str, str, str]] = Counter()
    for step in steps:
        tenant = step.tenant if step.tenant in named[0] else "other"
        type = step.type if step.type in named[1] else "other"
        for stage in STAGES:
            totals[tenant, type, step.channel, stage] += getattr(step, stage)
    metrics.funnel.clear()
    for labels, count in totals.items():
        metrics.funnel.labels(*labels).set(count)
