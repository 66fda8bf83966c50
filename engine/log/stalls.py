"""Saying that a stream or Redis takes nothing: at once when it is full, after a while when its leader may only be changing."""

from __future__ import annotations

import time

import structlog

from engine import metrics
from engine.broker.refusals import is_full
from engine.limits import STALL_SECONDS
from seamark.protocol.errors import SeamarkError

_log = structlog.get_logger("seamark.dispatcher")

CLAIMS = "claims"
"""In place of a stream's name: Redis, which keeps the claims."""


class Stall:
    """One wait for one stream. Raises the alarm when it is due, and repeats its log line every 30 s.

    Args:
        stream: what is waited for: a stream, or `CLAIMS`.
        event: what the log calls it.
    """

    def __init__(self, stream: str, event: str = "partition_waits") -> None:
        self._stream = stream
        self._event = event
        self._started = time.monotonic()
        self._report_at = 0.0
        self._raised = False

    def report(self, error: SeamarkError) -> None:
        """It still takes nothing, and this is why."""
        now = time.monotonic()
        if (not is_full(error) and now - self._started < STALL_SECONDS) or now < self._report_at:
            return
        self._report_at = now + STALL_SECONDS
        if not self._raised:
            self._raised = True
            metrics.append_stalled.labels(self._stream).inc()
        _log.error(self._event, stream=self._stream, why=str(error), seconds=int(now - self._started))

    def over(self) -> None:
        """The wait has ended, one way or another."""
        if self._raised:
            metrics.append_stalled.labels(self._stream).dec()
