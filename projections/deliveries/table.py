"""What receipts say, in PostgreSQL: deliveries, ranges, device cursors and checkpoint change in one transaction.

Receipts of gateways stay ranges. A range says of hundreds of notifications what one row each would say, needs no part of the
log to have been folded before it, and is expanded where somebody asks (view `delivery_states`, proof, funnel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Final

from engine.partition.reader import Delivered
from engine.postgres import Connection, transposed
from projections import metrics
from projections.folds.deliveries import (
    DEVICES_MAX,
    PROVIDER_IDS_MAX,
    Delivery,
    Notification,
    Plan,
    Receipts,
    fold,
    replanned,
)
from projections.folds.inbox import moment
from projections.postgres.store import TableStore
from projections.postgres.versions import filled_leaves
from projections.projection import DELIVERIES

_MERGE: Final = f"""
UPDATE deliveries_{{v}} d SET
    attempts = greatest(d.attempts, o.attempts),
    segments = greatest(d.segments, o.segments),
    provider_ids = CASE WHEN o.provider_ids IN ('', d.provider_ids) THEN d.provider_ids
        WHEN d.provider_ids = '' THEN o.provider_ids ELSE (SELECT string_agg(line, E'\n' ORDER BY line COLLATE "C") FROM (
            SELECT DISTINCT line COLLATE "C" AS line
            FROM unnest(string_to_array(d.provider_ids || E'\n' || o.provider_ids, E'\n')) AS line
            ORDER BY 1 LIMIT {PROVIDER_IDS_MAX}) AS lines) END,
    sent_at = least(d.sent_at, o.sent_at),
    delivered_at = least(d.delivered_at, o.delivered_at),
    acknowledged_at = least(d.acknowledged_at, o.acknowledged_at),
    seen_at = least(d.seen_at, o.seen_at),
    read_at = least(d.read_at, o.read_at),
    kept_until = greatest(d.kept_until, o.kept_until),
    (rank, state, reason, provider, trace, at) = (SELECT w.rank, w.state, w.reason, w.provider, w.trace, w.at
        FROM (VALUES (d.rank, d.state, d.reason, d.provider, d.trace, d.at),
            (o.rank, o.state, o.reason, o.provider, o.trace, o.at))
            AS w (rank, state, reason, provider, trace, at)
        ORDER BY w.rank DESC, w.at, w.reason COLLATE "C" DESC, w.provider COLLATE "C" DESC, w.trace COLLATE "C" DESC LIMIT 1)
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::text[], $8::text[],
    $9::text[], $10::text[], $11::timestamptz[], $12::integer[], $13::timestamptz[], $14::timestamptz[],
    $15::timestamptz[], $16::timestamptz[], $17::timestamptz[], $18::text[], $19::integer[], $20::timestamptz[])
    AS o (tenant, user_id, id, channel, device, rank, state, reason, provider, trace, at, attempts,
        sent_at, delivered_at, acknowledged_at, seen_at, read_at, provider_ids, segments, kept_until)
WHERE d.tenant = o.tenant AND d.user_id = o.user_id AND d.id = o.id AND d.channel = o.channel AND d.device = o.device
RETURNING d.tenant, d.user_id, d.id, d.channel, d.device
"""
_KEY: Final = DELIVERIES.tables[0].key
_FACTS: Final = DELIVERIES.tables[0].facts
_TOLD: Final = tuple(name for name in _FACTS if not name.startswith("plan_"))
"""What receipts of channels say; the rest is of planners."""
_facts, _told = attrgetter(*_FACTS), attrgetter(*_TOLD)
_COLUMNS: Final = (*_KEY, *_FACTS, "kept_until", "version")

_OF_NOTIFICATIONS: Final = f"""
SELECT d.tenant, d.user_id, d.id, d.channel, {", ".join(f"d.{name}" for name in _FACTS)}, d.kept_until
FROM deliveries_{{v}} d, unnest($1::text[], $2::text[], $3::text[]) AS o (tenant, user_id, id)
WHERE d.tenant = o.tenant AND d.user_id = o.user_id AND d.id = o.id AND d.device = ''
"""

_REMOVE: Final = """
DELETE FROM deliveries_{v} d USING unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS o (tenant, user_id, id, channel)
WHERE d.tenant = o.tenant AND d.user_id = o.user_id AND d.id = o.id AND d.channel = o.channel AND d.device = ''
"""

_RANGES: Final = """
INSERT INTO delivery_ranges_{v}
    (tenant, user_id, epoch, up_to, after_seq, device, channel, state, at, sent_at, kept_until, version)
SELECT o.tenant, o.user_id, o.epoch, o.up_to, o.after_seq, o.device, o.channel, o.state, o.at, o.sent_at,
    ($12::timestamptz[])[o.place], {v}
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::text[], $7::text[], $8::text[],
    $9::timestamptz[], $10::timestamptz[], $11::integer[])
    AS o (tenant, user_id, epoch, up_to, after_seq, device, channel, state, at, sent_at, place)
WHERE {new}
"""
"""`place` says which of the times in $12 is that of the tenant: ranges are thousands, and a time costs more than a number."""

# A row that is there already may be in another month, which the key of this month does not cover.
_NEW: Final = """NOT EXISTS (SELECT FROM {month} f
    WHERE f.tenant = o.tenant AND f.user_id = o.user_id AND f.epoch = o.epoch AND f.up_to = o.up_to
      AND f.after_seq = o.after_seq AND f.device = o.device AND f.channel = o.channel AND f.state = o.state)"""

RANGES_IN_ALL_MONTHS_MAX: Final = 200
"""Up to so many ranges of a batch are looked for in all months. For more it costs less to see which months hold rows, and to look
in those only: in each it takes 2 µs a range, and of the tables of a rebuild all but one may be empty."""

_CURSORS: Final = """
WITH written AS (INSERT INTO device_cursors AS c (tenant, user_id, device, epoch, seq, at, touched_at, version)
SELECT o.tenant, o.user_id, o.device, CASE WHEN w.moves THEN o.epoch ELSE f.epoch END,
    CASE WHEN w.moves THEN o.seq ELSE f.seq END, CASE WHEN w.moves THEN o.at ELSE f.at END, o.touched_at, {v}
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::timestamptz[], $7::timestamptz[], $8::boolean[])
    AS o (tenant, user_id, device, epoch, seq, at, touched_at, anew)
    LEFT JOIN LATERAL (SELECT * FROM device_cursors n
        WHERE n.tenant = o.tenant AND n.user_id = o.user_id AND n.device = o.device AND n.version = {v} LIMIT 1) f ON true
    CROSS JOIN LATERAL (SELECT f.seq IS NULL OR o.anew OR f.epoch <> o.epoch OR f.seq < o.seq AS moves) w
ON CONFLICT (tenant, user_id, device, version) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq, at = excluded.at,
    touched_at = greatest(c.touched_at, excluded.touched_at)
RETURNING c.tenant, c.user_id, c.xmax = 0 AS added)
SELECT DISTINCT tenant, user_id FROM written WHERE added ORDER BY tenant, user_id
"""
"""Gives the users who have a device that was not known. Each row is looked for by its key (`LIMIT` forbids any other plan): of a
version that has just grown there are no statistics, and all its rows were compared with all of the batch."""

_SURPLUS: Final = """
DELETE FROM device_cursors WHERE ctid = ANY (ARRAY(
    SELECT s.place FROM unnest($1::text[], $2::text[]) AS o (tenant, user_id), LATERAL (
        SELECT n.ctid AS place FROM device_cursors n WHERE n.tenant = o.tenant AND n.user_id = o.user_id AND n.version = {v}
        ORDER BY n.touched_at DESC, n.device OFFSET {most}) s))
"""


class DeliveriesStore(TableStore):
    """The rows of one partition of RECEIPTS."""

    projection = DELIVERIES

    async def _fold(self, connection: Connection, batch: Sequence[Delivered], epoch: str, era: int) -> None:
        folded = fold(batch)
        tenants = {key[0] for key in (*folded.deliveries, *folded.plans)} | {one[0] for one in folded.ranges.values()}
        retention = await self._retention(connection, tenants)
        at = moment(batch[-1].time_nanoseconds)
        until = {tenant: retention.kept_until(tenant, at) for tenant in tenants}
        await write(connection, self._version, folded, until.__getitem__)
        if folded.skipped:
            metrics.projection_skipped.labels(DELIVERIES.name).inc(folded.skipped)


async def write(connection: Connection, version: int, folded: Receipts, kept_until: Callable[[str], datetime]) -> None:
    """Merge what a batch says into what is known. Rows go in the order of their keys, which an index likes."""
    if folded.deliveries:
        rows = [
            (*key, *_told(one), kept_until(key[0]))
            for key, one in sorted(folded.deliveries.items(), key=lambda item: item[0])
        ]
        # A row that is there already may be in another month, which the key of this month does not cover.
        known = {tuple(row) for row in await connection.fetch(_MERGE.format(v=version), *transposed(rows))}
        added = [(*row, version) for row in rows if row[:5] not in known]
        columns = (*_KEY, *_TOLD, "kept_until", "version")
        if added:
            await connection.copy_records_to_table(f"deliveries_{version}", records=added, columns=columns)
    if folded.plans:
        await _write_plans(connection, version, folded.plans, kept_until)
    if folded.ranges:
        until = {tenant: kept_until(tenant) for tenant in {one[0] for one in folded.ranges.values()}}
        places = {tenant: place for place, tenant in enumerate(until, 1)}
        ranges = [(*one, places[one[0]]) for one in sorted(folded.ranges.values())]
        table = f"delivery_ranges_{version}"
        months = [table] if len(ranges) <= RANGES_IN_ALL_MONTHS_MAX else await filled_leaves(connection, table)
        new = " AND ".join(_NEW.format(month=month) for month in months) or "true"
        await connection.execute(_RANGES.format(v=version, new=new), *transposed(ranges), list(until.values()))
    cursors = [
        (*key, c.epoch, c.seq, c.at, moment(c.touched_nanoseconds), c.anew) for key, c in sorted(folded.cursors.items())
    ]
    if cursors:
        # A user can have too many devices only when one is new.
        anew = await connection.fetch(_CURSORS.format(v=version), *transposed(cursors))
        if users := [tuple(row) for row in anew]:
            await connection.execute(_SURPLUS.format(v=version, most=DEVICES_MAX), *transposed(users))


async def _write_plans(
    connection: Connection,
    version: int,
    plans: Mapping[Notification, Plan],
    kept_until: Callable[[str], datetime],
) -> None:
    """Make each notification's rows those of its plan, unless they are those of a plan that wins over it."""
    known: dict[Notification, dict[str, Delivery]] = {}
    kept: dict[tuple[str, ...], datetime] = {}
    for row in await connection.fetch(_OF_NOTIFICATIONS.format(v=version), *transposed(sorted(plans))):
        notification, channel = (row["tenant"], row["user_id"], row["id"]), row["channel"]
        known.setdefault(notification, {})[channel] = Delivery(*row[4:-1])
        kept[*notification, channel] = row["kept_until"]
    removed, added = [], []
    for notification, plan in sorted(plans.items(), key=lambda item: item[0]):
        for channel, delivery in sorted(replanned(known.get(notification, {}), plan).items()):
            place, until = (*notification, channel), kept_until(notification[0])
            if place in kept:
                removed.append(place)
                until = max(until, kept[place])
            if delivery is not None:
                added.append((*place, "", *_facts(delivery), until, version))
    if removed:
        await connection.execute(_REMOVE.format(v=version), *transposed(removed))
    if added:
        await connection.copy_records_to_table(f"deliveries_{version}", records=added, columns=_COLUMNS)
