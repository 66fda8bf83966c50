"""`inbox`: how long the first page of an inbox takes when the table is large, against a bare round trip to the database."""

import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg

from bench.report import milliseconds, percentile, progress
from engine.partition.reader import Delivered
from ops.dev.servers import Postgres
from ops.migrate import migrate
from projections.inbox.queries import Filter, InboxQueries
from projections.inbox.table import InboxStore
from projections.store import Checkpoint

BATCH = 2_000
EPOCH = "benchmrk"
BUSY_SHARE = 20
"""One record in so many is for one and the same user, whose inbox is very long."""


async def run(
    *, records: int = 1_000_000, users: int = 10_000, pages: int = 2_000, data: Path | None = None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="seamark-bench-", dir=data) as folder:
        server = Postgres(Path(folder) / "postgres")
        server.start()
        try:
            await migrate(server.url)
            async with asyncpg.create_pool(server.url, min_size=1, max_size=2) as pool:
                return await _measure(pool, records, users, pages)
        finally:
            server.stop()


async def _measure(pool: asyncpg.Pool, records: int, users: int, pages: int) -> dict[str, Any]:
    progress(f"folding {records} records of {users} users")
    store, at, began = InboxStore(pool, 0), None, time.perf_counter()
    for batch in _batches(records, users):
        reached = Checkpoint(EPOCH, batch[-1].seq)
        assert await store.apply(batch, at, reached)
        at = reached
    seconds = time.perf_counter() - began
    await pool.execute("VACUUM ANALYZE inbox_1", timeout=600)
    queries = InboxQueries(pool, 1)
    rng = random.Random(1)

    def anybody() -> str:
        return f"user-{rng.randrange(users)}"

    kinds: dict[str, Callable[[], Awaitable[Any]]] = {
        "first_page": lambda: queries.page("default", anybody(), Filter()),
        "unread": lambda: queries.page("default", anybody(), Filter(unread=True)),
        "very_long_inbox": lambda: queries.page("default", "user-0", Filter()),
        "very_long_inbox_category": lambda: queries.page("default", "user-0", Filter(category="rare")),
        "round_trip": lambda: pool.fetchval("SELECT 1"),
    }
    found = {}
    for name, ask in kinds.items():
        progress(name)
        times = []
        for _ in range(pages):
            started = time.perf_counter()
            await ask()
            times.append(time.perf_counter() - started)
        times.sort()
        found[name] = {"p50_ms": milliseconds(percentile(times, 0.5)), "p99_ms": milliseconds(percentile(times, 0.99))}
    size = await pool.fetchval("SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('inbox') WHERE isleaf")
    return {
        "result": {**found, "folded_per_second": round(records / seconds), "bytes_per_record": round(size / records)},
        "yardstick": {"round_trip_p99_ms": found["round_trip"]["p99_ms"]},
        "ratio": round(found["first_page"]["p99_ms"] / max(found["round_trip"]["p99_ms"], 0.1), 1),
    }


def _batches(records: int, users: int) -> Iterator[list[Delivered]]:
    """Notifications, and a mark of what was read now and then."""
    rng = random.Random(0)
    batch: list[Delivered] = []
    started = time.time_ns() - records * 1_000_000
    for seq in range(1, records + 1):
        user = 0 if seq % BUSY_SHARE == 0 else rng.randrange(users)
        if seq % 50 == 0:
            body = b'{"id":"r%d","kind":"read","up_to":%d,"at":"2026-01-31T12:00:00Z","device":"d"}' % (
                seq,
                seq - 5_000,
            )
        else:
            body = (
                b'{"id":"e%d","kind":"notification","tenant":"default","user":"user-%d","type":"order.shipped",'
                b'"category":"%b","priority":"normal","at":"2026-01-31T12:00:00Z","event":{"epoch":"e","seq":%d},'
                b'"data":{"text":"Your order is on its way to you"},"plan":{"inapp":{"when":"now","why":"default"}}}'
            ) % (seq, user, b"rare" if seq % 5_003 == 0 else b"orders", seq)
        batch.append(Delivered(b"log.0.default.user-%d" % user, seq, started + seq * 1_000_000, b"", body))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
