"""Timers shared by all sessions: pings, expiry, time-outs. One timer of the loop for all of them, none per session."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

import structlog

from engine.limits import SCAN_FEEDS_PER_TURN

_log = structlog.get_logger("seamark.wheel")

TICK_SECONDS: Final = 0.05
"""Resolution: fine enough for the first back-off of a read (50 ms), twenty wake-ups a second at most."""


class Wheel:
    """Calls back after a delay, at most a tick late. A call cannot be cancelled: the callee checks if it is still wanted."""

    __slots__ = ("_due", "_loop", "_order", "_ready", "_running", "_slots", "_timer")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._slots: dict[int, list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}
        self._order: list[int] = []  # a heap of the slots: some hundred are looked at 20 times a second
        self._ready: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0
        self._running = False

    def now(self) -> float:
        """The clock of the delays: monotonic seconds."""
        return self._loop.time()

    def later(self, delay_seconds: float, callback: Callable[..., None], *args: Any) -> None:
        """Call `callback(*args)` in `delay_seconds`; many calls due at once are spread over turns of the loop."""
        slot = int((self._loop.time() + delay_seconds) / TICK_SECONDS) + 1
        calls = self._slots.get(slot)
        if calls is None:
            self._slots[slot] = [(callback, args)]
            heappush(self._order, slot)
            if self._timer is None or slot < self._due:
                self._arm()
        else:
            calls.append((callback, args))

    def close(self) -> None:
        """Forget all calls."""
        self._slots.clear()
        self._order.clear()
        self._ready.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = self._order[0]
        self._timer = self._loop.call_at(self._due * TICK_SECONDS, self._turn)

    def _turn(self) -> None:
        self._timer = None
        current = int(self._loop.time() / TICK_SECONDS + 1e-6)
        while self._order and self._order[0] <= current:
            self._ready.extend(self._slots.pop(heappop(self._order)))
        if self._order:
            self._arm()
        if not self._running:
            self._run()

    def _run(self) -> None:
        for _ in range(min(len(self._ready), SCAN_FEEDS_PER_TURN)):
            callback, args = self._ready.popleft()
            try:
                callback(*args)
            except Exception:
                # One session's fault must not take the timers of all others with it.
                _log.exception("timer_failed")
        self._running = bool(self._ready)
        if self._running:
            self._loop.call_soon(self._run)
