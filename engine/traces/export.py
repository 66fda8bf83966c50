"""Sending the spans of a process to an OpenTelemetry collector, and its end. Loaded only where that is wanted."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBasedTraceIdRatio
from opentelemetry.trace import SpanContext

from engine.limits import BATCH_MESSAGES_MAX
from engine.settings import Settings
from engine.traces.spans import Ids, Spans, activate

QUEUED_SPANS: Final = 2048
"""What waits for a collector; some 2 MiB. What has waited longest is lost then."""

EXPORT_SECONDS: Final = 10
"""For one export, tries again included."""

CLOSE_SECONDS: Final = 1.0
"""What a role waits at its end for a collector to take the last spans: less than it is cut off after."""


class _Ids(RandomIdGenerator):
    """See `engine.traces.spans.Ids`."""

    def __init__(self) -> None:
        self.first: SpanContext | None = None

    def generate_trace_id(self) -> int:
        return super().generate_trace_id() if self.first is None else self.first.trace_id

    def generate_span_id(self) -> int:
        return (0 if self.first is None else self.first.span_id) or super().generate_span_id()


def provider_of_hops(resource: Resource) -> tuple[TracerProvider, Ids]:
    """What `Spans` are made with: it samples everything, and a round's span may link to all of its events."""
    ids, limits = _Ids(), SpanLimits(max_links=BATCH_MESSAGES_MAX)
    return TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=ids, span_limits=limits), ids


@contextlib.contextmanager
def exporting(settings: Settings, identity: dict[str, str]) -> Iterator[Spans]:
    """Export what this process makes of spans for as long as the block runs.

    Requests over HTTP become spans of the global provider, which obeys their callers and else follows one in so many.

    Args:
        identity: what tells this process from others, as resource attributes.

    Raises:
        ImportError: the exporter for this address is not installed.
    """
    # How long it pauses between two exports is OpenTelemetry's to say: OTEL_BSP_SCHEDULE_DELAY, else 5 s.
    processor = BatchSpanProcessor(_exporter(settings), max_queue_size=QUEUED_SPANS)
    resource = Resource.create(dict(identity))
    requests = TracerProvider(ParentBasedTraceIdRatio(1 / settings.trace_one_in), resource, shutdown_on_exit=False)
    hops, ids = provider_of_hops(resource)
    for provider in (requests, hops):
        provider.add_span_processor(processor)
    trace.set_tracer_provider(requests)
    spans = Spans(
        hops.get_tracer("seamark"), ids, one_in=settings.trace_one_in, follow_seconds=settings.trace_follow_seconds
    )
    # What was lost is said; each try before would be another line.
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)
    activate(spans)
    try:
        yield spans
    finally:
        activate(None)
        # Its own way to end waits for as long as a collector is given: half a minute.
        ending = threading.Thread(target=processor.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)


def _exporter(settings: Settings) -> SpanExporter:
    endpoint = settings.traces_endpoint or ""
    scheme, _, address = endpoint.partition("://")
    if scheme.startswith("grpc"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc(endpoint=address.rstrip("/"), insecure=scheme == "grpc", timeout=EXPORT_SECONDS)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    return OverHttp(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
