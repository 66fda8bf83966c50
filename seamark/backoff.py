"""How long to wait before the next attempt: twice as long each time, and partly by chance, so that a storm spreads out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def doubled_seconds(failures: int, first_seconds: float, max_seconds: float) -> float:
    """The wait after so many failures in a row: `first_seconds` after the first one, then twice as long each time."""
    return min(max_seconds, first_seconds * 2.0 ** min(failures - 1, 30))


@dataclass(slots=True)
class Backoff:
    """Counts the failures in a row of one kind of attempt, and says how long to wait after each.

    Args:
        first_seconds: upper bound of the first wait.
        max_seconds: upper bound of every wait.
        jitter: the part of a wait that is left to chance. All of it by default: when thousands of devices come back after
            a restart, any minimum that they have in common is a wave.
        rng: uniform numbers in [0, 1); tests pass their own.
    """

    first_seconds: float = 0.5
    max_seconds: float = 30.0
    jitter: float = 1.0
    rng: Callable[[], float] = field(default=random.random)
    failures: int = 0

    def next_seconds(self) -> float:
        """Count a failure and give the wait before the next attempt."""
        self.failures += 1
        longest = doubled_seconds(self.failures, self.first_seconds, self.max_seconds)
        return longest * (1.0 - self.jitter + self.jitter * self.rng())

    def succeeded(self) -> None:
        """The peer works again: the next failure is the first."""
        self.failures = 0


def retry_after_seconds(headers: Mapping[str, str] | None) -> float | None:
    """How long an HTTP answer asks to stay away; None: it does not say, or by a date, which needs a clock like the server's."""
    said = (headers or {}).get("Retry-After", "")
    return float(said) if said.isascii() and said.isdigit() else None
