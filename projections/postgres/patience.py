"""Outlives a broker or a database that is away for a while, for work that nobody waits for by the second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from engine.errors import Unanswered, Unavailable
from engine.tasks import end_if_cancelled
from projections.store import StoreBroken, StoreUnavailable
from seamark.backoff import Backoff

_log = structlog.get_logger("seamark.projection")

T = TypeVar("T")

PATIENCE_SECONDS: Final = 900.0
"""A server that is restarted, upgraded or moved is back by then; an outage that lasts longer is for a person to look at."""

PAUSE_SECONDS_MIN: Final = 0.25
PAUSE_SECONDS_MAX: Final = 2.0
"""Between two attempts."""

AWAY: Final = (Unavailable, Unanswered, StoreUnavailable)
"""What passes by itself. Anything else, `StoreBroken` too, is raised at once: a fault of ours must not look like an outage."""


async def patiently(ask: Callable[[], Awaitable[T]], seconds: float = PATIENCE_SECONDS) -> T:
    """Return what `ask` returns. While a server is away, `ask` is called again for up to `seconds`, so it must be repeatable.

    Raises:
        Unavailable, Unanswered, StoreUnavailable: the server was away for longer.
        StoreBroken: at once, as asking again would not help.
    """
    until: float | None = None
    backoff, said = Backoff(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX, jitter=0.5), False
    while True:
        try:
            return await ask()
        except AWAY as error:
            # From the first failure on: what fails after an hour of work has waited for nobody yet.
            until = until or time.monotonic() + seconds
            if isinstance(error, StoreBroken) or time.monotonic() >= until:
                raise
            if not said:
                said = True
                _log.warning("waiting_for_server", why=str(error)[:200])
        end_if_cancelled()
        await asyncio.sleep(backoff.next_seconds())
