"""Which streams have stopped storing what they are sent, judged by what became of the writes to them.

A server whose disk was full answers no write to a stream from then on, also when there is room again, until it is
restarted; its API goes on to describe the stream as if nothing were wrong. It may refuse batches as
incomplete instead, because it cannot set them aside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from engine.limits import UNSTORED_DOUBT_SECONDS, UNSTORED_SECONDS
from seamark.protocol.subjects import (
    BULK_STREAM,
    DEAD_LETTERS_STREAM,
    EVENTS_STREAM,
    JOBS_STREAM,
    LATER_STREAM,
    RECEIPTS_STREAM,
    log_stream,
)

_STREAMS: Final = {
    "events": EVENTS_STREAM,
    "bulk": BULK_STREAM,
    "rcpt": RECEIPTS_STREAM,
    "dlq": DEAD_LETTERS_STREAM,
    **dict.fromkeys(("job", "jobsched", "jmark"), JOBS_STREAM),
    **dict.fromkeys(("wait", "later", "due"), LATER_STREAM),
}
"""By the first word of their subjects, as far as that word alone tells."""


class Writes:
    """What became of one connection's writes. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failing: dict[str, tuple[float, float]] = {}  # when its first and its last write came to nothing

    def stored(self, stream: str) -> None:
        """A write was stored."""
        if self._failing:
            self._failing.pop(stream, None)

    def not_stored(self, subject: str) -> None:
        """A write to `subject` was not answered in time although connected, or the server could not set a batch aside."""
        stream = stream_of_subject(subject)
        if stream is not None:
            now = self._clock()
            first, last = self._failing.get(stream, (now, now))
            self._failing[stream] = first if now - last <= UNSTORED_DOUBT_SECONDS else now, now

    def forget(self, stream: str | None = None) -> None:
        """Another server, or another leader of this stream, answers from now on."""
        if stream is None:
            self._failing.clear()
        else:
            self._failing.pop(stream, None)

    def stopped(self) -> dict[str, float]:
        """Streams that store nothing, and for how many seconds.

        A role that is not ready gets no more traffic, and without a write nothing would ever show that the stream stores
        again. So a failure counts only for a while after the last failed write.
        """
        now = self._clock()
        return {
            stream: now - first
            for stream, (first, last) in sorted(self._failing.items())
            if last - first >= UNSTORED_SECONDS and now - last <= UNSTORED_DOUBT_SECONDS
        }


def stream_of_subject(subject: str) -> str | None:
    """Which of Seamark's streams stores messages of this subject; None: none does."""
    kind, _, rest = subject.partition(".")
    if kind in ("log", "mark"):
        number = rest.partition(".")[0]
        if kind == "mark" and number == "later":
            return LATER_STREAM
        return log_stream(int(number)) if number.isdecimal() else None
    if kind == "$KV":
        return f"KV_{rest.partition('.')[0]}"
    return _STREAMS.get(kind)
