"""What receipts say, in PostgreSQL: deliveries, ranges, device cursors and checkpoint change in one transaction.

Receipts of gateways stay ranges. A range says of hundreds of notifications what one row each would say, needs no part of the
log to have been folded before it, and is expanded where somebody asks (view `delivery_states`, proof, funnel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from engine import metrics
from engine.broker.jetstream import Broker
from engine.partition.reader import Delivered, Source
from projections.folds.deliveries import DEVICES_MAX, Receipts, fold
from projections.folds.inbox import moment
from projections.inbox.table import CHECKPOINT_SECONDS
from projections.postgres.versions import Book, asking, transaction
from projections.retention.rules import RetentionCache
from projections.runner import ProjectionWorker
from projections.store import Checkpoint
from seamark.protocol.subjects import RECEIPTS_STREAM

if TYPE_CHECKING:
    from projections.postgres.versions import Connection, Pool

DELIVERIES: Final = "deliveries"

EARLIEST: Final = {
    "deliveries": "least(at, sent_at, delivered_at, acknowledged_at, seen_at, read_at)",
    "delivery_ranges": "at",
    "device_cursors": "at",
}
"""When the first receipt was given that a row of each table holds. Where the stream no longer has it, the row cannot be folded
again."""

GATEWAY_CLOCK_SLACK: Final = timedelta(minutes=5)
"""Receipts carry the time of a gateway's clock, which may differ this much from the broker's clock."""

_MERGE: Final = """
UPDATE deliveries_{v} d SET
    attempts = greatest(d.attempts, o.attempts),
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
    $15::timestamptz[], $16::timestamptz[], $17::timestamptz[], $18::timestamptz[])
    AS o (tenant, user_id, id, channel, device, rank, state, reason, provider, trace, at, attempts,
        sent_at, delivered_at, acknowledged_at, seen_at, read_at, kept_until)
WHERE d.tenant = o.tenant AND d.user_id = o.user_id AND d.id = o.id AND d.channel = o.channel AND d.device = o.device
RETURNING d.tenant, d.user_id, d.id, d.channel, d.device
"""
_DELIVERY_COLUMNS: Final = (
    "tenant", "user_id", "id", "channel", "device", "rank", "state", "reason", "provider", "trace", "at", "attempts",
    "sent_at", "delivered_at", "acknowledged_at", "seen_at", "read_at", "kept_until", "version",
)  # fmt: skip

# A row that is there already may be in another month, which the key of this month does not cover.
_RANGES: Final = """
INSERT INTO delivery_ranges_{v}
    (tenant, user_id, epoch, up_to, after_seq, device, channel, state, at, sent_at, kept_until, version)
SELECT o.*, {v} FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::text[], $7::text[], $8::text[],
    $9::timestamptz[], $10::timestamptz[], $11::timestamptz[])
    AS o (tenant, user_id, epoch, up_to, after_seq, device, channel, state, at, sent_at, kept_until)
WHERE NOT EXISTS (SELECT FROM delivery_ranges_{v} f
    WHERE f.tenant = o.tenant AND f.user_id = o.user_id AND f.epoch = o.epoch AND f.up_to = o.up_to
      AND f.after_seq = o.after_seq AND f.device = o.device AND f.channel = o.channel AND f.state = o.state)
"""

_CURSORS: Final = """
INSERT INTO device_cursors AS c (tenant, user_id, device, epoch, seq, at, touched_at, version)
SELECT o.tenant, o.user_id, o.device, CASE WHEN w.moves THEN o.epoch ELSE f.epoch END,
    CASE WHEN w.moves THEN o.seq ELSE f.seq END, CASE WHEN w.moves THEN o.at ELSE f.at END, o.touched_at, {v}
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::timestamptz[], $7::timestamptz[], $8::boolean[])
    AS o (tenant, user_id, device, epoch, seq, at, touched_at, anew)
    LEFT JOIN device_cursors f ON f.tenant = o.tenant AND f.user_id = o.user_id AND f.device = o.device AND f.version = {v}
    CROSS JOIN LATERAL (SELECT f.seq IS NULL OR o.anew OR f.epoch <> o.epoch OR f.seq < o.seq AS moves) w
ON CONFLICT (tenant, user_id, device, version) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq, at = excluded.at,
    touched_at = greatest(c.touched_at, excluded.touched_at)
RETURNING c.tenant, c.user_id, c.xmax = 0 AS added
"""

_SURPLUS: Final = """
DELETE FROM device_cursors c USING unnest($1::text[], $2::text[]) AS o (tenant, user_id), LATERAL (
    SELECT n.device FROM device_cursors n WHERE n.tenant = o.tenant AND n.user_id = o.user_id AND n.version = {v}
    ORDER BY n.touched_at DESC, n.device OFFSET {most}) s
WHERE c.tenant = o.tenant AND c.user_id = o.user_id AND c.device = s.device AND c.version = {v}
"""


class DeliveriesStore:
    """A `projections.store.Store` of one partition of RECEIPTS.

    Args:
        version: a fixed version, for a rebuild; None: whichever is live.
    """

    def __init__(self, pool: Pool, partition: int, *, version: int | None = None) -> None:
        self._pool = pool
        self._book = Book(DELIVERIES, RECEIPTS_STREAM, partition, version)
        self._retention = RetentionCache(DELIVERIES, anew=version is not None)

    async def checkpoint(self) -> Checkpoint | None:
        """The stored checkpoint."""
        async with asking(self._pool, CHECKPOINT_SECONDS) as connection:
            return await self._book.read(connection)

    async def apply(self, batch: Sequence[Delivered], expected: Checkpoint | None, reached: Checkpoint) -> bool:
        """Fold `batch` in: one transaction. Only it adds rows of the users of this checkpoint, so no row comes twice."""
        folded = fold(batch)
        retention = await self._retention.of(self._pool, self._book.version)
        at, now = moment(batch[-1].time_nanoseconds), datetime.now(UTC)
        async with transaction(self._pool) as connection:
            if await self._book.move(connection, expected, reached) is None:
                return False
            await write(connection, self._book.version, folded, lambda tenant: retention.kept_until(tenant, at, now))
        if folded.skipped:
            metrics.projection_skipped.labels(DELIVERIES).inc(folded.skipped)
        return True


async def write(connection: Connection, version: int, folded: Receipts, kept_until: Callable[[str], datetime]) -> None:
    """Merge what a batch says into what is known. Rows go in the order of their keys, which an index likes."""
    if folded.deliveries:
        rows = [
            (*key, d.rank, d.state, d.reason, d.provider, d.trace, d.at, d.attempts, d.sent_at, d.delivered_at,
             d.acknowledged_at, d.seen_at, d.read_at, kept_until(key[0]))
            for key, d in sorted(folded.deliveries.items(), key=lambda item: item[0])
        ]  # fmt: skip
        # A row that is there already may be in another month, which the key of this month does not cover.
        known = {tuple(row) for row in await connection.fetch(_MERGE.format(v=version), *_columns(rows))}
        added = [(*row, version) for row in rows if row[:5] not in known]
        if added:
            await connection.copy_records_to_table(f"deliveries_{version}", records=added, columns=_DELIVERY_COLUMNS)
    if folded.ranges:
        ranges = [(*one, kept_until(one[0])) for one in sorted(folded.ranges.values(), key=lambda one: one[:8])]
        await connection.execute(_RANGES.format(v=version), *_columns(ranges))
    if folded.cursors:
        await _write_cursors(connection, version, folded)


async def _write_cursors(connection: Connection, version: int, folded: Receipts) -> None:
    """Move the cursors of devices. A user can have too many devices only when one is new."""
    cursors = [(*key, c.epoch, c.seq, c.at, c.touched_at, c.anew) for key, c in sorted(folded.cursors.items())]
    written = await connection.fetch(_CURSORS.format(v=version), *_columns(cursors))
    users = sorted({(row["tenant"], row["user_id"]) for row in written if row["added"]})
    if users:
        await connection.execute(_SURPLUS.format(v=version, most=DEVICES_MAX), *_columns(users))


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def deliveries(pool: Pool) -> tuple[Callable[[int], Source], Callable[[Broker, int], ProjectionWorker]]:
    """What the projector needs: where it reads, and who folds."""

    def source(p: int) -> Source:
        return Source(RECEIPTS_STREAM, f"deliveries-{p}", f"rcpt.{p}.>")

    def worker(broker: Broker, p: int) -> ProjectionWorker:
        return ProjectionWorker(broker, DELIVERIES, RECEIPTS_STREAM, DeliveriesStore(pool, p), f"rcpt.{p}.>")

    return source, worker
