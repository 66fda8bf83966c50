"""`dispatch`: how fast a dispatcher empties EVENTS, and what an event costs it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load import Copies, broker_limit, commit_all, event
from bench.machine import cpu_seconds
from bench.report import per_unit, progress
from bench.stack import Stack, stack

ROLES = ("dispatcher", "broker", "valkey")


async def run(
    *, events: int = 100_000, users: int = 2_000, data: Path | None = None, sync: str | None = None, hurry: bool = False
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        progress("the broker's own limit")
        before = await broker_limit(bench.broker, events, users)
        emptied = await empty(bench, events, users)
        after = await broker_limit(bench.broker, events, users, tenant="yardstick2")
    limit = (before.per_second + after.per_second) / 2
    return {
        "result": {
            "events_per_second": round(emptied.per_second),
            "publish_per_second": round(events / emptied.publish_seconds),
        },
        "yardstick": {"broker_records_per_second": round(limit)},
        "ratio": round(emptied.per_second / limit, 3),
        "cpu_us_per_notification": emptied.cpu_us,
    }


@dataclass(frozen=True, slots=True)
class Emptied:
    """How EVENTS was filled and emptied. `cpu_us`: processor time per notification, by role."""

    publish_seconds: float
    per_second: float
    cpu_us: dict[str, float]


async def empty(bench: Stack, events: int, users: int) -> Emptied:
    """Fill EVENTS, for users in turn, then start a dispatcher and watch until the last record is republished."""
    progress(f"publishing {events} events")
    started = time.perf_counter()
    await commit_all(bench.broker, [event(number, number % users, 0.0) for number in range(events)])
    published = time.perf_counter() - started
    copies = Copies(bench.broker, "live.*.default.>")
    await copies.ready()
    progress("dispatching them")
    await bench.start("dispatcher")
    # The first copy says that the partitions are taken over: what comes before is start-up, not work.
    await copies.until(1)
    cpu, started, first = {role: cpu_seconds(bench.pids(role)) for role in ROLES}, time.perf_counter(), copies.seen
    await copies.until(events)
    seconds, work = time.perf_counter() - started, events - first
    copies.close()
    spent = {role: per_unit(cpu_seconds(bench.pids(role)) - cpu[role], work) for role in ROLES}
    return Emptied(published, work / seconds, spent)
