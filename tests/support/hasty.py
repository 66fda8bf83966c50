"""`seamark worker` that waits for nothing long: tries, leases and pauses between tries last moments. Run as a module."""

import sys
from typing import Any, Final

from engine.jobs import breaker, handling, life, queue, worker
from engine.jobs.retry import POLICIES, RetryPolicy
from engine.worker import desk, gates

SEND_SECONDS: Final = 2.0
LEASE_SECONDS: Final = 5.0
ACK_WAIT_SECONDS: Final = 6.0
"""As `ack_wait` of the topology that it runs on: longer than a lease, as in earnest."""

PAUSE_SECONDS: Final = 0.3


class Hasty(RetryPolicy, frozen=True):
    """Waits a moment for what a provider asks to be waited for: APNs and the push services ask for a minute."""

    def pause_seconds(self, attempt: int, draw: float, **asked: Any) -> float:
        wanted = asked.get("retry_after_seconds")
        if wanted is not None:
            asked["retry_after_seconds"] = min(wanted, PAUSE_SECONDS)
        return super().pause_seconds(attempt, draw, **asked)


def hurry() -> None:
    """As often as in earnest, and sooner."""
    for module in (handling, worker):
        module.SEND_SECONDS = SEND_SECONDS  # type: ignore[misc,attr-defined]
    handling.LEASE_SECONDS = LEASE_SECONDS  # type: ignore[misc]
    handling.CONTENDED_SECONDS = 0.3  # type: ignore[misc]
    life.LEASE_MARGIN_SECONDS = 0.1  # type: ignore[misc]
    worker.KEEP_SECONDS = queue.KEEP_SECONDS = ACK_WAIT_SECONDS / 4  # type: ignore[misc]
    # Jobs that wait for the probe of a provider, or for a place at an endpoint, come again soon: they are the last ones.
    breaker.PAUSE_SECONDS_MAX = breaker.PAUSE_SECONDS  # type: ignore[misc]
    breaker.PROBE_SECONDS = gates.PLACE_SECONDS = SEND_SECONDS + 3.0  # type: ignore[misc]
    desk.WAIT_SECONDS_MAX = desk.HELD_SECONDS = 1.0  # type: ignore[misc]
    for channel, policy in POLICIES.items():
        delays = tuple(min(PAUSE_SECONDS, delay) for delay in policy.delays_seconds)
        POLICIES[channel] = Hasty(delays, policy.shares, 600)


if __name__ == "__main__":
    hurry()
    sys.argv = ["seamark", "worker"]
    from ops.cli import main

    main()
