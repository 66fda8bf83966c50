"""A line of the log for what may happen very often: it is said now and then, with how often it happened."""

from __future__ import annotations

import math
import time
from typing import Any, Final

import structlog

SAID_SECONDS: Final = 30.0
"""How often such a line is said at most."""


class CountedLine:
    """An error that is said at once, and then at most every 30 s for as long as it happens.

    Args:
        logger: whose line it is.
        event: what the log calls it.
        always: what each line says.
    """

    def __init__(self, logger: str, event: str, **always: object) -> None:
        self._log: Any = structlog.get_logger(logger)
        self._event, self._always = event, always
        self._said_at = -math.inf
        self._unsaid = 0

    def add(self, **values: object) -> None:
        """It has happened once more. `values`: what the line says of this time, if it is said now."""
        self._unsaid += 1
        now = time.monotonic()
        if now - self._said_at >= SAID_SECONDS:
            self._said_at, count, self._unsaid = now, self._unsaid, 0
            self._log.error(self._event, count=count, **self._always, **values)
