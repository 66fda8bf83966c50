"""The budget of retries of a provider: so small a share of all sends that retries alone can never be a storm. Pure.

When it is spent retries are not forbidden but wait ten times as long. Each worker keeps its own: if no worker exceeds the share,
all together do not.
"""

from __future__ import annotations

from typing import Final

import msgspec

SHARE: Final = 0.1
"""Retries among the sends of a minute."""

FREE: Final = 10.0
"""Retries a minute that always fit, or a provider with little traffic would never be tried again soon."""

MINUTE_SECONDS: Final = 60.0

SLOWER: Final = 10.0
"""How much longer a retry waits once the budget is spent."""


class Budget(msgspec.Struct, frozen=True):
    """Sends and retries of late; what is a minute older counts half.

    Args:
        at: when they were counted, in seconds of the worker's monotonic clock.
    """

    sends: float = 0.0
    retries: float = 0.0
    at: float = 0.0

    def told(self, now: float, *, retry: bool) -> Budget:
        """With one more send."""
        left = 0.5 ** (max(0.0, now - self.at) / MINUTE_SECONDS)
        return Budget(self.sends * left + 1, self.retries * left + retry, max(self.at, now))

    def slower(self, now: float) -> float:
        """By how much a retry that is scheduled now has to wait longer: 1, or `SLOWER`."""
        left = 0.5 ** (max(0.0, now - self.at) / MINUTE_SECONDS)
        return SLOWER if self.retries * left >= max(FREE, self.sends * left * SHARE) else 1.0
