"""Sending the spans of a process to an OpenTelemetry collector, and its end. Loaded only where that is wanted."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, cast

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBasedTraceIdRatio, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from engine import metrics
from engine.errors import InvalidSetting
from engine.settings import Settings
from engine.traces.hopspans import Encoder, HopSpans
from engine.traces.spans import NOBODY, Spans, activate

QUEUED_SPANS: Final = 2048
"""So many spans wait for a collector, some 2 MiB. What comes while so many wait is lost."""

SAID_SECONDS: Final = 30.0
"""Between two lines in the log about spans that are lost."""

_BSP: Final = {
    "OTEL_BSP_SCHEDULE_DELAY": 3_600_000,
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": QUEUED_SPANS,
    "OTEL_BSP_EXPORT_TIMEOUT": 3_600_000,
}
"""The variables that OpenTelemetry's queue reads; each must be a whole number from 1 to this."""

_log = structlog.get_logger("seamark.traces")

EXPORT_SECONDS: Final = 10
"""For one export, tries again included."""

CLOSE_SECONDS: Final = 1.0
"""How long a role waits at its end for a collector to take the last spans. After `CLEAN_UP_SECONDS_MAX` (2 s) it is cut off."""


class Lost:
    """Spans that no collector gets for one reason, counted and said."""

    def __init__(self, reason: Literal["full", "refused", "end"]) -> None:
        self._reason, self._metric = reason, metrics.traces_lost.labels(reason)
        # The thread that exports has no context of its own, and a line of the log says by it which process wrote it.
        self._context = contextvars.copy_context()
        self._said_at = -math.inf
        self._unsaid = 0

    def add(self, count: int) -> None:
        """So many more."""
        self._metric.inc(count)
        self._unsaid += count
        now = time.monotonic()
        if now - self._said_at >= SAID_SECONDS:
            self._said_at, said, self._unsaid = now, self._unsaid, 0
            self._context.copy().run(_log.warning, "spans_lost", reason=self._reason, count=said)


class _Counted(SpanExporter):
    """An exporter that counts what it takes, and what it could not pass on. Only the thread that exports calls it."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter, self._lost = exporter, Lost("refused")
        self.taken = self.settled = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._lost.add(len(spans))
            self.settled += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class Queue(BatchSpanProcessor):
    """OpenTelemetry's queue of spans, which is never so full that it drops one silently: that is done here, and counted."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._lost = Lost("full")
        self._counted = _Counted(exporter)
        self._put = 0
        # How long it pauses between two exports is OpenTelemetry's to say: OTEL_BSP_SCHEDULE_DELAY, else 5 s.
        super().__init__(self._counted, max_queue_size=QUEUED_SPANS)

    @property
    def waiting(self) -> int:
        """How many spans wait: no export has taken them yet."""
        return self._put - self._counted.taken

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span, or lose it."""
        if self.waiting >= QUEUED_SPANS:
            self._lost.add(1)
        else:
            self._put += 1
            super().on_end(span)

    def end(self) -> None:
        """Export what waits, within `CLOSE_SECONDS`; count what is left."""
        # Its own way to end waits for as long as a collector is given: half a minute.
        ending = threading.Thread(target=self.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)
        left = self._put - self._counted.settled
        if left:
            Lost("end").add(left)


class Sampled(ParentBasedTraceIdRatio):
    """Follows the requests that their callers follow, and else one in so many, while there is room.

    Whoever asks is not known yet, and need not be anybody: all requests together have the room of one tenant.
    """

    def __init__(self, spans: Spans, one_in: int) -> None:
        super().__init__(1 / one_in)
        self._spans = spans

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """As OpenTelemetry's samplers."""
        result = super().should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        if result.decision is Decision.RECORD_AND_SAMPLE and not self._spans.room(NOBODY):
            return SamplingResult(Decision.DROP, trace_state=result.trace_state)
        return result


@contextlib.contextmanager
def exporting(settings: Settings, identity: dict[str, str]) -> Iterator[Spans]:
    """Export what this process makes of spans for as long as the block runs.

    Requests over HTTP become spans of the global provider, which obeys their callers and else follows one in so many.

    Args:
        identity: what tells this process from others, as resource attributes.

    Raises:
        ImportError: the exporter for this address is not installed.
        InvalidSetting: a variable of OpenTelemetry's queue makes no sense.
    """
    check_queue(os.environ)
    resource = Resource.create(dict(identity))
    queue = Queue(_exporter(settings, Encoder(resource)))
    spans = Spans(
        HopSpans(resource, queue.on_end),
        one_in=settings.trace_one_in,
        follow_seconds=settings.trace_follow_seconds,
    )
    requests = TracerProvider(Sampled(spans, settings.trace_one_in), resource, shutdown_on_exit=False)
    requests.add_span_processor(queue)
    trace.set_tracer_provider(requests)
    # Why a collector gets none is said; each try before would be another line.
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)
    activate(spans)
    try:
        yield spans
    finally:
        activate(None)
        queue.end()


def check_queue(environment: Mapping[str, str]) -> None:
    """Pass what OpenTelemetry's queue is told by its own variables: it would take a default for what it cannot read.

    Raises:
        InvalidSetting: a value is no whole number, or too large.
    """
    for variable, highest in _BSP.items():
        value = environment.get(variable, "1")
        if not (value.isascii() and value.isdecimal() and len(value) < 10 and 1 <= int(value) <= highest):
            raise InvalidSetting(f"{variable} must be a whole number, 1 to {highest}, not {value[:40]!r}")


def _exporter(settings: Settings, encoder: Encoder) -> SpanExporter:
    """OpenTelemetry's exporter. In its module our encoder takes the place of its own; all else is left to it."""
    endpoint = settings.traces_endpoint or ""
    scheme, _, address = endpoint.partition("://")
    if scheme.startswith("grpc"):
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

        cast("Any", over_grpc).encode_spans = encoder
        return over_grpc.OTLPSpanExporter(
            endpoint=address.rstrip("/"), insecure=scheme == "grpc", timeout=EXPORT_SECONDS
        )
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

    cast("Any", over_http).encode_spans = encoder
    return over_http.OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
