"""What receipts say, in PostgreSQL: deliveries, ranges, device cursors and checkpoint change in one transaction.

Receipts of gateways stay ranges. A range says of hundreds of notifications what one row each would say, needs no part of the
log to have been folded before it, and is expanded where somebody asks (view `delivery_states`, proof, funnel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from engine import metrics
from engine.jetstream import Broker
from engine.partition import Delivered, Source, Worker
from engine.subjects import RECEIPTS_STREAM
from projections.delivery_state import Receipts, fold
from projections.inbox import CHECKPOINT_SECONDS
from projections.postgres import Book, asking, transaction
from projections.runner import ProjectionWorker
from projections.store import Checkpoint

if TYPE_CHECKING:
    from projections.postgres import Connection, Pool

DELIVERIES: Final = "deliveries"

EARLIEST: Final = {
    "deliveries": "least(at, sent_at, delivered_at, acknowledged_at, seen_at, read_at)",
    "delivery_ranges": "at",
    "device_cursors": "at",
}
"""The time of the first receipt that a row of a table is known to hold: older than the stream, it cannot be folded again."""

_DELIVERIES: Final = """
INSERT INTO deliveries_{v} AS d (tenant, user_id, id, channel, device, rank, state, reason, provider, trace, at, attempts,
    sent_at, delivered_at, acknowledged_at, seen_at, read_at, version)
SELECT *, {v} FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::text[], $8::text[],
    $9::text[], $10::text[], $11::timestamptz[], $12::integer[], $13::timestamptz[], $14::timestamptz[],
    $15::timestamptz[], $16::timestamptz[], $17::timestamptz[])
ON CONFLICT (tenant, user_id, id, channel, device) DO UPDATE SET
    attempts = greatest(d.attempts, excluded.attempts),
    sent_at = least(d.sent_at, excluded.sent_at),
    delivered_at = least(d.delivered_at, excluded.delivered_at),
    acknowledged_at = least(d.acknowledged_at, excluded.acknowledged_at),
    seen_at = least(d.seen_at, excluded.seen_at),
    read_at = least(d.read_at, excluded.read_at),
    (rank, state, reason, provider, trace, at) = (SELECT w.rank, w.state, w.reason, w.provider, w.trace, w.at
        FROM (VALUES (d.rank, d.state, d.reason, d.provider, d.trace, d.at),
            (excluded.rank, excluded.state, excluded.reason, excluded.provider, excluded.trace, excluded.at))
            AS w (rank, state, reason, provider, trace, at)
        ORDER BY w.rank DESC, w.at, w.reason COLLATE "C" DESC, w.provider COLLATE "C" DESC, w.trace COLLATE "C" DESC LIMIT 1)
"""

_RANGES: Final = """
INSERT INTO delivery_ranges_{v} (tenant, user_id, epoch, up_to, after_seq, device, channel, state, at, sent_at, version)
SELECT *, {v} FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::text[], $7::text[], $8::text[],
    $9::timestamptz[], $10::timestamptz[])
ON CONFLICT DO NOTHING
"""

_CURSORS: Final = """
INSERT INTO device_cursors AS c (tenant, user_id, device, epoch, seq, at, version)
SELECT o.tenant, o.user_id, o.device, o.epoch, o.seq, o.at, {v}
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::timestamptz[], $7::boolean[])
    AS o (tenant, user_id, device, epoch, seq, at, anew)
    LEFT JOIN device_cursors f ON f.tenant = o.tenant AND f.user_id = o.user_id AND f.device = o.device AND f.version = {v}
WHERE f.seq IS NULL OR o.anew OR f.epoch <> o.epoch OR f.seq < o.seq
ON CONFLICT (tenant, user_id, device, version) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq, at = excluded.at
"""


class DeliveriesStore:
    """A `projections.store.Store` of one partition of RECEIPTS.

    Args:
        version: a fixed version, for a rebuild; None: whichever is live.
    """

    def __init__(self, pool: Pool, partition: int, *, version: int | None = None) -> None:
        self._pool = pool
        self._book = Book(DELIVERIES, RECEIPTS_STREAM, partition, version)

    async def checkpoint(self) -> Checkpoint | None:
        """The stored checkpoint."""
        async with asking(self._pool, CHECKPOINT_SECONDS) as connection:
            return await self._book.read(connection)

    async def apply(self, batch: Sequence[Delivered], expected: Checkpoint | None, reached: Checkpoint) -> bool:
        """Fold `batch` in."""
        folded = fold(batch)
        async with transaction(self._pool) as connection:
            if await self._book.move(connection, expected, reached) is None:
                return False
            await write(connection, self._book.version, folded)
        if folded.skipped:
            metrics.projection_skipped.labels(DELIVERIES).inc(folded.skipped)
        return True


async def write(connection: Connection, version: int, folded: Receipts) -> None:
    """Merge what a batch says into what is known. Rows go in the order of their keys, which an index likes."""
    if folded.deliveries:
        rows = [
            (*key, d.rank, d.state, d.reason, d.provider, d.trace, d.at, d.attempts, d.sent_at, d.delivered_at,
             d.acknowledged_at, d.seen_at, d.read_at)
            for key, d in sorted(folded.deliveries.items(), key=lambda item: item[0])
        ]  # fmt: skip
        await connection.execute(_DELIVERIES.format(v=version), *_columns(rows))
    if folded.ranges:
        ranges = sorted(folded.ranges.values(), key=lambda one: one[:8])
        await connection.execute(_RANGES.format(v=version), *_columns(ranges))
    if folded.cursors:
        cursors = [(*key, c.epoch, c.seq, c.at, c.anew) for key, c in sorted(folded.cursors.items())]
        await connection.execute(_CURSORS.format(v=version), *_columns(cursors))


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def deliveries(pool: Pool) -> tuple[Callable[[int], Source], Callable[[Broker, int], Worker]]:
    """What the projector needs: where it reads, and who folds."""

    def source(p: int) -> Source:
        return Source(RECEIPTS_STREAM, f"deliveries-{p}", f"rcpt.{p}.>")

    def worker(broker: Broker, p: int) -> Worker:
        return ProjectionWorker(broker, DELIVERIES, RECEIPTS_STREAM, DeliveriesStore(pool, p), f"rcpt.{p}.>")

    return source, worker
