"""`dispatch`: how fast a dispatcher empties EVENTS, and what an event costs it."""

import time
from pathlib import Path
from typing import Any

from bench.load import Copies, broker_limit, commit_all, event
from bench.machine import cpu_seconds
from bench.report import per_unit, progress
from bench.stack import stack


async def run(
    *, events: int = 100_000, users: int = 2_000, data: Path | None = None, sync: str | None = None, hurry: bool = False
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        progress("the broker's own limit")
        before = await broker_limit(bench.broker, events, users)
        progress(f"publishing {events} events")
        started = time.perf_counter()
        await commit_all(bench.broker, [event(number, number % users, 0.0) for number in range(events)])
        published = time.perf_counter() - started
        copies = Copies(bench.broker, "live.*.default.>")
        await copies.ready()
        progress("dispatching them")
        await bench.start("dispatcher")
        roles = ("dispatcher", "broker", "valkey")
        # The first copy says that the partitions are taken over: what comes before is start-up, not work.
        await copies.until(1)
        cpu, started, first = {role: cpu_seconds(bench.pids(role)) for role in roles}, time.perf_counter(), copies.seen
        await copies.until(events)
        seconds, work = time.perf_counter() - started, events - first
        spent = {role: per_unit(cpu_seconds(bench.pids(role)) - cpu[role], work) for role in roles}
        after = await broker_limit(bench.broker, events, users, tenant="yardstick2")
    rate, limit = work / seconds, (before.per_second + after.per_second) / 2
    return {
        "result": {"events_per_second": round(rate), "publish_per_second": round(events / published)},
        "yardstick": {"broker_records_per_second": round(limit)},
        "ratio": round(rate / limit, 3),
        "cpu_us_per_notification": spent,
    }
