"""How much somebody may do in a given time: token buckets, one for each key."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Final

REMEMBERED: Final = 100_000
"""Keys with a bucket of their own; then the least recently used one is forgotten, which fills its bucket."""

_ROUNDING_SECONDS: Final = 1e-6
"""Sums of floats must not refuse the last one of a burst."""


class Buckets:
    """Grants each key an amount per minute. All of it, or `burst`, may be taken at once.

    A bucket is remembered as the moment at which it will be full again (GCRA), one number a key. One that is full is as good as
    none: each `take` forgets up to two of those used longest ago, else each user who was ever here would cost 90 bytes and a key.
    They are in an OrderedDict, as the front of a plain dict is slow to reach when much was taken off it: 57 µs with 100 000 keys.

    Args:
        per_minute: how much comes back in a minute; 0 sets no bound.
        burst: how much can be taken at once; by default the amount of a minute.
        now: monotonic clock in seconds.
    """

    def __init__(
        self, per_minute: float = 0, *, burst: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_minute / 60
        self._burst = per_minute if burst is None else burst
        self._now = now
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()

    @property
    def bounded(self) -> bool:
        """Whether there is a bound at all."""
        return self._per_second > 0

    def take(self, key: Hashable, cost: float = 1.0) -> bool:
        """Take `cost`. False, and nothing is taken, when the key has less left."""
        if not self.bounded:
            return True
        if self.wait_seconds(key, cost) > 0:
            return False
        now = self._now()
        full_at = max(self._full_at.pop(key, now), now)
        for old in list(islice(self._full_at, 2)):
            if self._full_at[old] <= now or len(self._full_at) >= REMEMBERED:
                del self._full_at[old]
        self._full_at[key] = full_at + cost / self._per_second
        return True

    def give_back(self, key: Hashable, cost: float = 1.0) -> None:
        """Undo a `take`: what it paid for has cost nothing after all."""
        if self.bounded and key in self._full_at:
            self._full_at[key] -= cost / self._per_second

    def wait_seconds(self, key: Hashable, cost: float = 1.0) -> float:
        """How long until `cost` can be taken; 0: now. Nothing is taken."""
        if not self.bounded:
            return 0.0
        now = self._now()
        missing = max(self._full_at.get(key, now) - now, 0.0) + (cost - self._burst) / self._per_second
        return missing if missing > _ROUNDING_SECONDS else 0.0
