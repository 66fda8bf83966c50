"""The trace context that travels with what a request publishes, and the span of its being stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from aiohttp import web
from opentelemetry import context as ambient
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext

from engine.traces import names
from engine.traces.contexts import as_version_00, context_of, traceparent_of
from engine.traces.lines import about
from engine.traces.spans import Spans, failed
from seamark.protocol.events import Encoded

_PARENT = "traceparent"


def trace_of(request: web.Request) -> dict[str, str]:
    """The caller's trace context, to travel with the event."""
    given = {name: request.headers.get(name, "") for name in (_PARENT, "tracestate")}
    # Bytes beyond ASCII stand in no valid one, and cannot be written into a header of the event.
    found = {name: value for name, value in given.items() if 1 <= len(value) <= 512 and value.isascii()}
    if _PARENT in found:
        found[_PARENT] = as_version_00(found[_PARENT].encode()).decode()
    return found


def caller_of(request: web.Request) -> ambient.Context:
    """What the span of a request belongs to: the caller's `traceparent`, and nothing else that it sends.

    OpenTelemetry's own `extract` would read `baggage` as well: its pattern takes half a second for 8 KiB of blanks, in which no
    session gets anything, and whoever sends them need not be known.
    """
    context = context_of(trace_of(request).get(_PARENT))
    nothing = ambient.Context()
    return nothing if context is None else trace.set_span_in_context(NonRecordingSpan(context), nothing)


def current_trace() -> str | None:
    """`traceparent` of the request that is answered, where it is followed."""
    context = trace.get_current_span().get_span_context()
    return traceparent_of(context) if context.is_valid and context.trace_flags.sampled else None


@contextlib.contextmanager
def accepting(spans: Spans | None, caller: Mapping[str, str], event: Encoded) -> Iterator[Mapping[str, str]]:
    """The span of an event's being stored, as long as the block runs; gives the headers that the event is stored with.

    Lines of the log belong to it.

    Args:
        spans: None: the caller's own context goes with the event, as it is.
        caller: see `trace_of`.
    """
    if spans is None:
        yield caller
        return
    context = context_of(caller.get(_PARENT))
    span = _begin(spans, context, event)
    if span is None:
        try:
            yield caller
        except Exception as error:
            spans.error(_hop(event), context, type(error).__name__, {}, tenant=_tenant(event))
            raise
        return
    at = span.get_span_context()
    try:
        with about(at):
            yield {**(caller if context is not None else {}), _PARENT: traceparent_of(at)}
    except Exception as error:
        failed(span, type(error).__name__)
        raise
    finally:
        span.end()


def _begin(spans: Spans, caller: SpanContext | None, event: Encoded) -> Span | None:
    """The span, where the caller has the event followed, or nobody has decided and it is one of those that are.

    Where there is no room for it, the event goes on as it came: dispatchers have room of their own.
    """
    request, hop = trace.get_current_span().get_span_context(), _hop(event)
    if caller is not None:
        if not caller.trace_flags.sampled or not spans.room(_tenant(event)):
            return None
        within = request.trace_flags.sampled and request.trace_id == caller.trace_id
        return spans.begin(hop, request if within else caller, {})
    first = spans.first(*event.msg_id.split(":", 1), critical=event.critical)
    if first is None or not spans.room(_tenant(event)):
        return None
    # A random span id: an event that is sent again has another span.
    span = spans.begin_first(hop, SpanContext(first.trace_id, 0, is_remote=True), {})
    if request.trace_flags.sampled:
        span.add_link(request)
    return span


def _tenant(event: Encoded) -> str:
    return event.msg_id.partition(":")[0]


def _hop(event: Encoded) -> names.Hop:
    return names.ACCEPT_BULK if event.subject.startswith("bulk.") else names.ACCEPT
