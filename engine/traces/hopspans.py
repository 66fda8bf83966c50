"""The spans of hops, and their encoding in OTLP.

The SDK's own span has a lock, looks at the type of each attribute and copies what it is given, since anybody may give it
anything; its encoder looks at each once more. What hops say is known beforehand (`engine.traces.names`), and one task works on
each. So a span is a copy of its hop's, which is encoded once, with the little that differs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode

from engine.traces.contexts import SAMPLED
from engine.traces.names import Hop
from engine.traces.spans import Attributes

_KINDS: Final = {
    SpanKind.CLIENT: trace_pb2.Span.SPAN_KIND_CLIENT,
    SpanKind.PRODUCER: trace_pb2.Span.SPAN_KIND_PRODUCER,
    SpanKind.CONSUMER: trace_pb2.Span.SPAN_KIND_CONSUMER,
}
_NEAR: Final = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE: Final = _NEAR | trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
_UNSET: Final = Status()
_SCOPE: Final = InstrumentationScope("seamark")


class _OfHop(NamedTuple):
    """What all spans of a hop have in common: as a reader sees it, and `encoded` as it is sent."""

    hop: Hop
    name: str
    attributes: Mapping[str, str]
    encoded: trace_pb2.Span


class HopSpan(Span):
    """A span that is followed. When it ends it is handed over, once.

    Its public fields are those of the SDK's `ReadableSpan`, so that processors and exporters take it.
    """

    events: Final = ()
    dropped_attributes = dropped_events = dropped_links = 0
    instrumentation_scope: Final = _SCOPE

    def __init__(
        self,
        of_hop: _OfHop,
        context: SpanContext,
        parent: SpanContext | None,
        resource: Resource,
        said: dict[str, str | int],
        links: tuple[Link, ...],
        since: int,
        ended: Callable[[Any], None],
    ) -> None:
        self.context, self.parent, self.resource, self.links = context, parent, resource, links
        self.start_time, self.status = since, _UNSET
        self.end_time: int | None = None
        self._of_hop, self._said, self._ended = of_hop, said, ended

    @property
    def name(self) -> str:
        """That of its hop."""
        return self._of_hop.name

    @property
    def kind(self) -> SpanKind:
        """That of its hop."""
        return self._of_hop.hop.kind

    @property
    def attributes(self) -> dict[str, str | int]:
        """All that it says."""
        return {**self._of_hop.attributes, **self._said}

    def get_span_context(self) -> SpanContext:
        """Where it stands."""
        return self.context

    def end(self, end_time: int | None = None) -> None:
        """It is over, now or at `end_time` (Unix nanoseconds)."""
        if self.end_time is None:
            self.end_time = time.time_ns() if end_time is None else end_time
            self._ended(self)

    def is_recording(self) -> bool:
        """Until it has ended."""
        return self.end_time is None

    def set_attribute(self, key: str, value: Any) -> None:
        """Say one more thing: a text or a whole number, of another name than what its hop says."""
        self._said[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Say more things."""
        self._said.update(attributes)

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        """It has to do with another one, too."""
        self.links += (Link(context),)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """How it went. A description is not taken: it may hold personal data."""
        self.status = Status(status.status_code if isinstance(status, Status) else status)

    def update_name(self, name: str) -> None:
        """Change nothing: a span is called as its hop is."""

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Hops have no events: what could be in them is not looked through for personal data."""

    def record_exception(
        self, exception: BaseException, attributes: Any = None, timestamp: int | None = None, escaped: bool = False
    ) -> None:
        """Nothing is taken of an exception: its message may hold personal data."""

    def encode(self, to: trace_pb2.Span) -> None:
        """Write it into an empty message, as the SDK's encoder would."""
        to.CopyFrom(self._of_hop.encoded)
        context, parent = self.context, self.parent
        to.trace_id, to.span_id = context.trace_id.to_bytes(16), context.span_id.to_bytes(8)
        to.start_time_unix_nano, to.end_time_unix_nano = self.start_time, self.end_time or 0
        if context.trace_state:
            to.trace_state = context.trace_state.to_header()
        if parent is not None:
            to.parent_span_id = parent.span_id.to_bytes(8)
            if parent.is_remote:
                to.flags = _REMOTE
        for key, value in self._said.items():
            pair = to.attributes.add()
            pair.key = key
            if isinstance(value, int):
                pair.value.int_value = value
            else:
                pair.value.string_value = value
        for link in self.links:
            other = link.context
            to.links.add(
                trace_id=other.trace_id.to_bytes(16),
                span_id=other.span_id.to_bytes(8),
                flags=_REMOTE if other.is_remote else _NEAR,
            )
        if not self.status.is_ok:
            to.status.code = trace_pb2.Status.STATUS_CODE_ERROR


class Encoder:
    """Encodes spans: those of hops here, all others by OpenTelemetry's encoder, in whose place an exporter calls it.

    Args:
        resource: of the hops.
    """

    def __init__(self, resource: Resource) -> None:
        example = ReadableSpan("", SpanContext(1, 1, is_remote=False), resource=resource, instrumentation_scope=_SCOPE)
        [self._group] = encode_spans([example]).resource_spans
        self._group.scope_spans[0].ClearField("spans")

    def __call__(self, spans: Sequence[ReadableSpan | HopSpan]) -> ExportTraceServiceRequest:
        """What is sent of these spans."""
        request = encode_spans([span for span in spans if not isinstance(span, HopSpan)])
        hops = [span for span in spans if isinstance(span, HopSpan)]
        if hops:
            group = request.resource_spans.add()
            group.CopyFrom(self._group)
            add = group.scope_spans[0].spans.add
            for span in hops:
                span.encode(add())
        return request


class HopSpans:
    """Makes the spans of a process.

    Args:
        resource: what tells the process from others.
        ended: takes each span that has ended, such as the `on_end` of a processor.
    """

    def __init__(self, resource: Resource, ended: Callable[[Any], None]) -> None:
        self._resource = resource
        self._ended = ended
        self._of_hops: dict[Hop, _OfHop] = {}

    def begin(
        self,
        hop: Hop,
        parent: SpanContext | None,
        links: Iterable[SpanContext],
        attributes: Attributes,
        since: int | None,
        first: SpanContext | None = None,
    ) -> Span:
        """The span of a hop, below `parent`; without one it begins a trace.

        Args:
            links: other contexts that it has to do with.
            since: when it began, in Unix nanoseconds; None: now.
            first: the ids that a trace begins with, where they were found for it; a span id of 0: a random one.
        """
        of_hop = self._of_hops.get(hop)
        if of_hop is None:
            of_hop = self._of_hops[hop] = _in_common(hop)
        origin = parent or first
        context = SpanContext(
            _random(128) if origin is None else origin.trace_id,
            (0 if first is None else first.span_id) or _random(64),
            is_remote=False,
            trace_flags=SAMPLED,
            trace_state=None if parent is None else parent.trace_state,
        )
        return HopSpan(
            of_hop, context, parent, self._resource, dict(attributes), tuple(Link(one) for one in links),
            time.time_ns() if since is None else since, self._ended,
        )  # fmt: skip


def _in_common(hop: Hop) -> _OfHop:
    encoded = trace_pb2.Span(name=hop.title, kind=_KINDS[hop.kind], flags=_NEAR, status=trace_pb2.Status())
    for key, value in hop.attributes.items():
        encoded.attributes.add(key=key).value.string_value = value
    return _OfHop(hop, hop.title, hop.attributes, encoded)


def _random(bits: int) -> int:
    return random.getrandbits(bits) or 1  # 0 is no id
