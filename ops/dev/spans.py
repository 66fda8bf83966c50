"""The spans of the last minutes in memory: what an OTLP receiver was sent, by trace (ADR 0046)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

SECONDS: Final = 900
"""How long a trace is kept after its last span came. The page says "15 minutes" (`web/traces.html`, `web/traces.js`)."""

SPANS_MAX: Final = 20_000
"""Some 20 MB. The traces that came first leave before there are more."""

_KINDS: Final = {
    trace_pb2.Span.SPAN_KIND_INTERNAL: "internal",
    trace_pb2.Span.SPAN_KIND_SERVER: "server",
    trace_pb2.Span.SPAN_KIND_CLIENT: "client",
    trace_pb2.Span.SPAN_KIND_PRODUCER: "producer",
    trace_pb2.Span.SPAN_KIND_CONSUMER: "consumer",
}


class Link(msgspec.Struct, frozen=True):
    """Another span that a span has to do with."""

    trace_id: str
    span_id: str


class Span(msgspec.Struct, frozen=True):
    """One span as it came. Times in Unix nanoseconds, ids in hexadecimal digits; `parent_id` empty: it has none."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    instance: str
    start: int
    end: int
    attributes: dict[str, Any]
    links: list[Link]
    failed: bool


class Overview(msgspec.Struct, frozen=True):
    """A trace in a line: its first span, when it began, how long it took, who was in it."""

    trace_id: str
    name: str
    start: int
    milliseconds: float
    spans: int
    services: list[str]
    failed: bool


def decode(body: bytes) -> list[Span]:
    """The spans in the body of an OTLP request.

    Raises:
        ValueError: it is none.
    """
    try:
        request = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise ValueError("not an ExportTraceServiceRequest of OTLP in protobuf") from error
    return list(spans_of(request))


def spans_of(request: ExportTraceServiceRequest) -> Iterator[Span]:
    """The spans in an OTLP request."""
    for group in request.resource_spans:
        resource = _values(group.resource.attributes)
        service = str(resource.get("service.name", "?"))
        instance = str(resource.get("service.instance.id", ""))
        for scope in group.scope_spans:
            for one in scope.spans:
                yield Span(
                    trace_id=one.trace_id.hex(),
                    span_id=one.span_id.hex(),
                    parent_id=one.parent_span_id.hex(),
                    name=one.name,
                    kind=_KINDS.get(one.kind, "?"),
                    service=service,
                    instance=instance,
                    start=one.start_time_unix_nano,
                    end=one.end_time_unix_nano,
                    attributes=_values(one.attributes),
                    links=[Link(link.trace_id.hex(), link.span_id.hex()) for link in one.links],
                    failed=one.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                )


class SpanStore:
    """Keeps what came in the last minutes, within a bound."""

    def __init__(self, seconds: float = SECONDS, spans_max: int = SPANS_MAX) -> None:
        self._seconds, self._spans_max = seconds, spans_max
        self._traces: dict[str, list[Span]] = {}  # in the order of their last span
        self._came_at: dict[str, float] = {}
        self._linked: defaultdict[str, set[str]] = defaultdict(set)
        self._count = 0

    def add(self, spans: Iterable[Span], now: float | None = None) -> None:
        """Take in what was received. `now`: by the monotonic clock."""
        now = time.monotonic() if now is None else now
        for span in spans:
            known = self._traces.pop(span.trace_id, [])
            self._traces[span.trace_id] = known
            self._came_at[span.trace_id] = now
            known.append(span)
            self._count += 1
            for link in span.links:
                self._linked[link.trace_id].add(span.trace_id)
        while self._traces and (
            self._count > self._spans_max or self._came_at[next(iter(self._traces))] < now - self._seconds
        ):
            self._forget(next(iter(self._traces)))

    def _forget(self, trace_id: str) -> None:
        for span in self._traces.pop(trace_id):
            self._count -= 1
            for link in span.links:
                self._linked[link.trace_id].discard(trace_id)
                if not self._linked[link.trace_id]:
                    del self._linked[link.trace_id]
        del self._came_at[trace_id]

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace, and those of others that link to one of them; in the order they began."""
        own = self._traces.get(trace_id, [])
        others = [
            span
            for other in self._linked.get(trace_id, ())
            for span in self._traces.get(other, [])
            if other != trace_id and any(link.trace_id == trace_id for link in span.links)
        ]
        return sorted([*own, *others], key=lambda span: (span.start, span.end))

    def overviews(self, most: int = 100) -> list[Overview]:
        """The traces with the newest spans first."""
        found: list[Overview] = []
        for trace_id, spans in reversed(self._traces.items()):
            if len(found) == most:
                break
            ids = {span.span_id for span in spans}
            first = min(spans, key=lambda span: (span.parent_id in ids, span.start))
            start, end = min(span.start for span in spans), max(span.end for span in spans)
            services = sorted({span.service for span in spans})
            failed = any(span.failed for span in spans)
            found.append(Overview(trace_id, first.name, start, (end - start) / 1e6, len(spans), services, failed))
        return found


def _values(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    if kind == "kvlist_value":
        return _values(value.kvlist_value.values)
    if kind == "bytes_value":
        return value.bytes_value.hex()
    return None if kind is None else getattr(value, kind)
