"""The course of a long run: what each minute of it was like, where one figure for all of it would hide that costs grow."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from bench.devices import Devices, Spread
from bench.machine import cpu_seconds, loop_ms
from bench.report import per_unit


class Course:
    """Stretches of a run, one after the other.

    Args:
        pids: processes of each role.
        lag: the worst lag since it was last asked.
    """

    def __init__(self, swarm: Devices, pids: dict[str, list[int]], lag: Callable[[], int]) -> None:
        self.stretches: list[dict[str, Any]] = []
        self._swarm = swarm
        self._pids = pids
        self._lag = lag
        self._delivered = 0
        self._latencies: Counter[int] = Counter()
        self._cpu = self._spent()

    async def follow(self, work: asyncio.Task[Any], stretch_seconds: float) -> None:
        """Look once in every stretch for as long as `work` lasts; a last stretch that is shorter is left out."""
        while True:
            await asyncio.wait({work}, timeout=stretch_seconds)
            if work.done():
                return
            await self._look()

    async def _look(self) -> None:
        facts = await self._swarm.expect(0, 0.0)  # what has come until now: nothing is waited for
        cpu, latencies = self._spent(), Spread.of(facts).counts
        delivered = facts["delivered"] - self._delivered
        self.stretches.append(
            {
                "delivered": delivered,
                **Spread(latencies - self._latencies).milliseconds(),
                "lag_max": self._lag(),
                "interpreter_loop_ms": round(await asyncio.to_thread(loop_ms), 1),
                "cpu_us_per_notification": {
                    role: per_unit(cpu[role] - self._cpu[role], delivered)
                    for role, found in self._pids.items()
                    if found
                },
            }
        )
        self._delivered, self._latencies, self._cpu = facts["delivered"], latencies, cpu

    def _spent(self) -> dict[str, float]:
        return {role: cpu_seconds(found) for role, found in self._pids.items()}
