"""Outlives a broker or a store that is away for a while, for work that nobody waits for by the second."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, TypeVarTuple

import structlog

from engine.errors import ApiError, StoreBroken, StoreUnavailable, Unanswered, Unavailable
from engine.tasks import end_if_cancelled
from seamark.backoff import Backoff

_log = structlog.get_logger("seamark.patience")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE_SECONDS: Final = 900.0
"""A server that is restarted, upgraded or moved is back by then; an outage that lasts longer is for a person to look at."""

PAUSE_SECONDS_MIN: Final = 0.1
PAUSE_SECONDS_MAX: Final = 2.0
"""Between two attempts."""

SERVER_TROUBLE: Final = 500
"""From this code on the broker speaks of its own state, below of what was asked."""


def passes(error: Exception) -> bool:
    """Whether it passes by itself. A fault of ours, `StoreBroken` too, must not look like an outage."""
    if isinstance(error, ApiError):
        return error.code >= SERVER_TROUBLE
    return isinstance(error, Unavailable | Unanswered | StoreUnavailable) and not isinstance(error, StoreBroken)


async def patiently(ask: Callable[[*Ts], Awaitable[T]], *args: *Ts, seconds: float = PATIENCE_SECONDS) -> T:
    """Return what `ask` returns. While a server is away, `ask` is called again for up to `seconds`, so it must be repeatable.

    Raises:
        BrokerError, StoreUnavailable: the server was away for longer; at once where asking again would not help.
    """
    until, backoff = math.inf, None
    while True:
        try:
            return await ask(*args)
        except Exception as error:
            if not passes(error):
                raise
            if backoff is None:
                # From the first failure on: what fails after an hour of work has waited for nobody yet.
                until, backoff = time.monotonic() + seconds, Backoff(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX, jitter=0.5)
                _log.warning("waiting_for_server", why=str(error)[:200])
            if time.monotonic() >= until:
                raise
        end_if_cancelled()
        await asyncio.sleep(backoff.next_seconds())
