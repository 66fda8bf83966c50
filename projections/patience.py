"""Outlives a broker or a database that is away for a while, for work that nobody waits for by the second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from engine.errors import Unanswered, Unavailable
from projections.store import StoreBroken, StoreUnavailable

_log = structlog.get_logger("seamark.rebuild")

T = TypeVar("T")

OUTAGE_SECONDS: Final = 300.0
"""A server that is restarted, upgraded or moved is back by then; whatever lasts longer is for a person to look at."""

PAUSE_SECONDS: Final = 1.0

AWAY: Final = (Unavailable, Unanswered, StoreUnavailable)
"""What passes by itself. Anything else, `StoreBroken` too, is raised at once: a fault of ours must not look like an outage."""


async def patiently(ask: Callable[[], Awaitable[T]], seconds: float = OUTAGE_SECONDS) -> T:
    """What `ask` gives, asked again for up to `seconds` while a server is away. `ask` must bear to be repeated.

    Raises:
        Unavailable, Unanswered, StoreUnavailable: the server was away for longer.
    """
    until: float | None = None
    while True:
        try:
            return await ask()
        except AWAY as error:
            # From the first failure on: what fails after an hour of work has waited for nobody yet.
            until = until or time.monotonic() + seconds
            if isinstance(error, StoreBroken) or time.monotonic() >= until:
                raise
            _log.warning("waiting_for_server", why=str(error)[:200])
        await asyncio.sleep(PAUSE_SECONDS)
