"""How often somebody may do something: token buckets, one for each who does."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Final

REMEMBERED: Final = 100_000
"""Keys with a bucket of their own; then the one heard of longest ago is forgotten, which fills its bucket."""


class Buckets:
    """So many a minute for each key, the whole minute as burst.

    Args:
        per_minute: 0 sets no bound.
        now: monotonic clock in seconds.
    """

    def __init__(self, per_minute: int = 0, *, now: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = float(per_minute)
        self._now = now
        self._buckets: dict[Hashable, tuple[float, float]] = {}

    def take(self, key: Hashable) -> bool:
        """Count one; False, and nothing counted, when the key has none left."""
        if self._per_minute <= 0:
            return True
        now = self._now()
        left, at = self._buckets.pop(key, (self._per_minute, now))
        left = min(self._per_minute, left + (now - at) * self._per_minute / 60)
        if len(self._buckets) >= REMEMBERED:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[key] = (left - 1 if left >= 1 else left, now)
        return left >= 1
