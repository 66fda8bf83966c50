"""`rebuild`: how fast projections are folded from the whole log, against a bare pull of the same streams."""

import asyncio
import time
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from bench.load import PARTITIONS, TENANT, bare_records, commit_all
from bench.machine import cpu_seconds
from bench.pull import bare_pull
from bench.report import per_unit, progress
from bench.stack import Stack, stack
from bench.tables import rebuild_tables
from projections.unread.store import FIRST_VERSION, meta_key

REBUILD_SECONDS_MAX = 300.0
POLL_SECONDS = 0.02


async def run(
    *, records: int = 200_000, users: int = 2_000, data: Path | None = None, sync: str | None = None
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync) as bench:
        progress(f"writing {records} records of {users} users")
        batches = bare_records(records, users, TENANT)
        await asyncio.gather(*(commit_all(bench.broker, messages) for messages in batches.values()))
        counts = {p: len(batches.get(p, ())) for p in range(PARTITIONS)}
        progress("a bare pull of the same streams")
        before = await bare_pull(bench.broker, counts)
        progress("unread")
        unread = await _unread(bench, counts)
        tables = await rebuild_tables(bench.broker, users, records // 4, data)
        after = await bare_pull(bench.broker, counts)
    pulled = 2 * records / (before + after)
    return {
        "result": {"unread": unread, **tables},
        "yardstick": {"pulled_records_per_second": round(pulled)},
        "ratio": {
            name: round(one["records_per_second"] / pulled, 3) for name, one in {"unread": unread, **tables}.items()
        },
    }


async def _unread(bench: Stack, counts: dict[int, int]) -> dict[str, Any]:
    """A projector over an empty Redis: what it does after a loss, and what a rebuild does beside the live version."""
    heads = {p: count for p, count in counts.items() if count}
    async with Redis.from_url(bench.valkey.url) as redis:
        began = time.perf_counter()
        await bench.start("projector")
        roles = ("projector", "broker", "valkey")
        # The first checkpoint says that a partition is taken over: what comes before is start-up, not work.
        first = await reached(redis, heads, 1)
        cpu, started = {role: cpu_seconds(bench.pids(role)) for role in roles}, time.perf_counter()
        last = await reached(redis, heads, sum(heads.values()))
        if 2 * first > last:  # so few that start-up is most of what there was to see
            first, started = 0, began
        seconds, work = time.perf_counter() - started, last - first
        spent = {role: per_unit(cpu_seconds(bench.pids(role)) - cpu[role], work) for role in roles}
        memory = (await redis.info("memory"))["used_memory"]
    return {
        "records_per_second": round(work / seconds),
        "cpu_us_per_record": spent,
        "redis_bytes_per_record": round(memory / sum(counts.values())),
    }


async def reached(redis: Redis, heads: dict[int, int], wanted: int) -> int:
    """How many records are folded, once it is `wanted` or more; logs hold nothing else here, so sequences count them."""
    deadline = time.monotonic() + REBUILD_SECONDS_MAX
    while True:
        values = await asyncio.gather(*(redis.hget(meta_key(p, FIRST_VERSION), "seq") for p in heads))
        folded = sum(int(value) for value in values if value is not None)
        if folded >= wanted:
            return folded
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folded} of {wanted} records are folded after {REBUILD_SECONDS_MAX:.0f} s")
        await asyncio.sleep(POLL_SECONDS)
