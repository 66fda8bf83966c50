"""Spans of what the SDK publishes and hands to the app, where the app has set up OpenTelemetry; else nothing is done here.

Names and attributes are those of OpenTelemetry's messaging conventions. No user, id or text is in them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from seamark.client.items import Record

if TYPE_CHECKING:
    from opentelemetry.trace import Span

try:
    from opentelemetry import context as ambient
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # without the package there is no context to send, and nowhere to send spans to
    _propagator = None
else:
    _propagator = TraceContextTextMapPropagator()

OPEN_MAX: Final = 1024
"""Followed records that the app has taken and not finished; the oldest one's span ends where there are more."""

FOLLOW: Final = timedelta(minutes=5)
"""A record that is older links to its origin, instead of stretching that trace."""

_LOG: Final = "log.{partition}.{tenant}.{user}"


@contextlib.contextmanager
def publishing(subject: str) -> Iterator[dict[str, str]]:
    """The span of publishing on `subject`, as long as the block runs; gives the headers that go with the event."""
    headers: dict[str, str] = {}
    if _propagator is None:
        yield headers
        return
    destination = f"{subject.partition('.')[0]}.{{tenant}}.{{key}}.{{type}}"
    # Exceptions are named, not quoted: their messages may hold what was published.
    with trace.get_tracer("seamark").start_as_current_span(
        f"publish {destination}",
        kind=trace.SpanKind.PRODUCER,
        attributes=_attributes("publish", "send", destination),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        _propagator.inject(headers)
        try:
            yield headers
        except Exception as error:
            _failed(span, error)
            raise


class Handling:
    """The spans of followed records that the app is at work on: from when it took them until they are done."""

    def __init__(self) -> None:
        self._open: dict[int, Span] = {}

    def taken(self, ticket: int, record: Record) -> None:
        """The app took a record; tickets rise."""
        if _propagator is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return
        origin = trace.get_current_span(
            _propagator.extract({"traceparent": record.trace or ""}, ambient.Context())
        ).get_span_context()
        if not origin.trace_flags.sampled:
            return
        fresh = _age(record) <= FOLLOW
        context = trace.set_span_in_context(trace.NonRecordingSpan(origin), ambient.Context())
        self._open[ticket] = trace.get_tracer("seamark").start_span(
            f"process {_LOG}",
            context if fresh else ambient.Context(),
            trace.SpanKind.CONSUMER,
            _attributes("process", "process", _LOG),
            [] if fresh else [trace.Link(origin)],
        )
        if len(self._open) > OPEN_MAX:
            self._open.pop(next(iter(self._open))).end()

    def done(self, ticket: int) -> None:
        """What was taken with this ticket, and all before it, is done."""
        for one in [one for one in self._open if one <= ticket]:
            self._open.pop(one).end()


def _age(record: Record) -> timedelta:
    try:
        return datetime.now(UTC) - datetime.fromisoformat(str(record.record.get("at")))
    except (ValueError, TypeError):
        return timedelta()


def _attributes(name: str, type: str, destination: str) -> dict[str, Any]:
    return {
        "messaging.system": "nats",
        "messaging.operation.name": name,
        "messaging.operation.type": type,
        "messaging.destination.template": destination,
    }


def _failed(span: Span, error: Exception) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(trace.Status(trace.StatusCode.ERROR))
