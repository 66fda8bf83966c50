"""The trace context that a caller sends, to travel with what it publishes."""

from __future__ import annotations

from aiohttp import web


def trace_of(request: web.Request) -> dict[str, str]:
    """The caller's trace context, to travel with the event."""
    given = {name: request.headers.get(name, "") for name in ("traceparent", "tracestate")}
    # Bytes beyond ASCII stand in no valid one, and cannot be written into a header of the event.
    return {name: value for name, value in given.items() if 1 <= len(value) <= 512 and value.isascii()}
