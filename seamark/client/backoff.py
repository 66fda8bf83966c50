"""How long to wait before the next attempt: exponential with full jitter, so that a storm spreads out by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Waits uniformly distributed over `0 … min(max, first · 2^n)` seconds; `succeeded()` starts anew.

    Full jitter, not "equal" jitter: after a gateway restart thousands of devices come back, and any common minimum is
    a wave.

    Args:
        first_seconds: upper bound of the first wait.
        max_seconds: upper bound of every wait.
        rng: uniform numbers in [0, 1); tests pass their own.
    """

    first_seconds: float = 0.5
    max_seconds: float = 30.0
    rng: Callable[[], float] = field(default=random.random)
    failures: int = 0

    def next_seconds(self) -> float:
        """Count a failure and give the wait before the next attempt."""
        self.failures += 1
        ceiling = min(self.max_seconds, self.first_seconds * 2.0 ** min(self.failures - 1, 30))
        return self.rng() * ceiling

    def succeeded(self) -> None:
        """The peer works again: the next failure is the first."""
        self.failures = 0


def retry_after_seconds(headers: Mapping[str, str] | None) -> float | None:
    """How long an answer asks to stay away; None: it does not say, or by a date, which needs a clock like the server's."""
    said = (headers or {}).get("Retry-After", "")
    return float(said) if said.isascii() and said.isdigit() else None
