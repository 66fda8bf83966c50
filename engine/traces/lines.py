"""Which notification the lines of the log are about: `engine.telemetry` asks here whenever a line is written.

Only what is followed costs anything. Where spans are not exported, lines name the traces of requests only.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Self

from opentelemetry.trace import SpanContext

from engine.traces.contexts import followed
from engine.traces.spans import active


class _About:
    """What a task works on while a block runs. Afterwards tasks that were begun in the block and go on forget it, too."""

    def __init__(self, context: SpanContext) -> None:
        self.context: SpanContext | None = context

    def __enter__(self) -> Self:
        self._token = _about.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _about.reset(self._token)
        self.context = None


_about: ContextVar[_About | None] = ContextVar("seamark_about", default=None)


def about(context: SpanContext | None) -> contextlib.AbstractContextManager[object]:
    """Have lines that are written within the block belong to `context`; None: to what they belong to without it."""
    return contextlib.nullcontext() if context is None else _About(context)


def about_followed(traceparent: bytes | str | None) -> contextlib.AbstractContextManager[object]:
    """The same by a `traceparent`, if that is followed and this process exports spans."""
    return about(followed(traceparent) if traceparent and active() is not None else None)


def current() -> SpanContext | None:
    """What a line that is written now belongs to."""
    found = _about.get()
    return None if found is None else found.context
