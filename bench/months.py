"""`months`: large tables. How fast a rebuild carries over rows that the log has lost, and how fast a month is dropped."""

import resource
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
from redis.asyncio import Redis

from bench.load import PARTITIONS, TENANT
from bench.machine import cpu_seconds
from bench.report import per_unit, progress
from bench.stack import stack
from ops.dev.servers import Postgres
from ops.migrate import migrate
from projections.rebuild.tables import Rebuild
from projections.retention.months import Months
from seamark.protocol.subjects import log_stream

FILL_ROWS = 500_000
"""Rows that one statement writes."""

DAYS = 90

_FILL = """
INSERT INTO inbox_1 (tenant, user_id, id, era, seq, epoch, stored_at, type, category, channels, shown, record, read_seq,
    kept_until, version)
SELECT $1, 'user-' || n % $2::bigint, md5(n::text), 1, n, 'benchmrk', t.at, 'order.shipped', 'orders', '{inapp}', true, $3,
    CASE WHEN n % 2 = 0 THEN n END, greatest(t.at + interval '90 days', now()), 1
FROM generate_series($4::bigint, $5::bigint) n, LATERAL (SELECT now() - interval '90 days' * (1 - n / $6::float8) AS at) t
"""


async def run(*, rows: int = 5_000_000, users: int = 50_000, data: Path | None = None) -> dict[str, Any]:
    async with stack(data=data) as bench:
        with tempfile.TemporaryDirectory(prefix="seamark-bench-", dir=data) as folder:
            server = Postgres(Path(folder) / "postgres")
            server.start()
            try:
                await migrate(server.url)
                async with (
                    asyncpg.create_pool(server.url, min_size=1, max_size=4) as pool,
                    Redis.from_url(bench.valkey.url) as redis,
                ):
                    filled = await _fill(pool, rows, users)
                    cpu, started = cpu_seconds([server.pid]), time.perf_counter()
                    progress(f"a rebuild that carries {rows} rows over")
                    done = await Rebuild(bench.broker, pool, "inbox", PARTITIONS, progress=_told).run()
                    seconds = time.perf_counter() - started
                    assert done.carried == rows
                    spent = cpu_seconds([server.pid]) - cpu
                    return {
                        "result": {
                            "filled_per_second": round(rows / filled),
                            "carried_per_second": round(rows / seconds),
                            "postgres_cpu_us_per_row": per_unit(spent, rows),
                            **await _drop(Months(bench.broker, redis, pool, PARTITIONS), pool),
                            "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                        },
                        "ratio": round(filled / seconds, 3),
                    }
            finally:
                server.stop()


def _told(stage: str, done: int, total: int) -> None:
    if stage == "inbox carried over" and done % 30 == 0:
        progress(f"{done} of {total} days")


async def _fill(pool: asyncpg.Pool, rows: int, users: int) -> float:
    """Seconds that PostgreSQL takes to write so many rows, 90 days of them, as folded from another incarnation of the log."""
    record = (
        b'{"id":"e","kind":"notification","tenant":"default","user":"user","type":"order.shipped","category":"orders",'
    )
    record += (
        b'"priority":"normal","at":"2026-01-31T12:00:00Z","data":{"text":"Your order is on its way to you"},"plan":{}}'
    )
    started = time.perf_counter()
    for first in range(1, rows + 1, FILL_ROWS):
        progress(f"{first - 1} of {rows} rows are written")
        last = min(rows, first + FILL_ROWS - 1)
        await pool.execute(_FILL, TENANT, users, record, first, last, rows, timeout=3600)
    for p in range(PARTITIONS):
        await pool.execute(
            "INSERT INTO projection_checkpoints (projection, version, stream, partition, epoch, era, seq)"
            " VALUES ('inbox', 1, $1, $2, 'benchmrk', 1, $3)",
            log_stream(p),
            p,
            rows,
        )
    return time.perf_counter() - started


async def _drop(months: Months, pool: asyncpg.Pool) -> dict[str, Any]:
    progress("dropping what is over")
    before = await pool.fetchval("SELECT count(*) FROM inbox", timeout=600)
    started = time.perf_counter()
    await months.keep(datetime.now(UTC) + timedelta(days=DAYS // 2))
    seconds = time.perf_counter() - started
    dropped = before - await pool.fetchval("SELECT count(*) FROM inbox", timeout=600)
    return {"dropped_rows": dropped, "dropped_in_seconds": round(seconds, 2)}
