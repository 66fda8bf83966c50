"""The course of a long benchmark: each stretch shows what came in it, and nothing of what came before."""

import asyncio
import os
from typing import Any

from bench.course import Course


class Swarm:
    """Devices to which `arrivals` come, one after the other: how many records, and how late; then the work is over."""

    def __init__(self, arrivals: list[tuple[int, int]]) -> None:
        self._arrivals = arrivals
        self._delivered = 0
        self._latencies: dict[int, int] = {}
        self.over = asyncio.Event()

    async def expect(self, total: int, seconds: float) -> dict[str, Any]:
        records, bucket = self._arrivals.pop(0)
        self._delivered += records
        self._latencies[bucket] = self._latencies.get(bucket, 0) + records
        if not self._arrivals:
            self.over.set()
        return {"delivered": self._delivered, "latencies": sorted(self._latencies.items())}


async def test_each_stretch_shows_what_came_in_it() -> None:
    swarm, lags = Swarm([(5, 9), (7, 99), (0, 9)]), iter((1, 2, 3))
    course = Course(swarm, {"broker": [os.getpid()], "pager": []}, lambda: next(lags))  # type: ignore[arg-type]
    work = asyncio.create_task(swarm.over.wait(), name="work")
    await course.follow(work, 0.001)
    shown = [(one["delivered"], one["p99_ms"], one["lag_max"]) for one in course.stretches]
    assert shown == [(5, 2.0, 1), (7, 20.0, 2), (0, None, 3)]
    assert all(one["cpu_us_per_notification"].keys() == {"broker"} for one in course.stretches)
    assert all(one["interpreter_loop_ms"] > 0 for one in course.stretches)
