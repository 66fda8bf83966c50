"""Spans for tests, as one process makes them."""

import json
import time
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.broker.jetstream import Outgoing
from engine.dispatch.rounds import Planned, batches, fan_out, plan
from engine.partition.reader import Delivered
from engine.traces.contexts import context_of
from engine.traces.hopspans import HopSpans
from engine.traces.spans import Spans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ORIGIN = context_of(PARENT)


class Collected:
    """Spans, and what they have exported."""

    def __init__(self, one_in: int = 100, follow_seconds: float = 300, per_second: float = 100_000) -> None:
        self.exporter = InMemorySpanExporter()
        hops = HopSpans(Resource({}), SimpleSpanProcessor(self.exporter).on_end)
        self.spans = Spans(hops, one_in=one_in, follow_seconds=follow_seconds, per_second=per_second)

    @property
    def found(self) -> list[Any]:
        return list(self.exporter.get_finished_spans())


def stored(headers: bytes = b"", **event: object) -> Delivered:
    body = json.dumps({"id": "e", "to": ["alice"], **event}).encode()
    return Delivered(b"ev.0.default.k.demo.hello", 7, time.time_ns(), b"NATS/1.0\r\n" + headers + b"\r\n", body)


def planned(event: Delivered, spans: Spans | None) -> Planned:
    outcome = plan(event, "epoch", spans)
    assert isinstance(outcome, Planned)
    return outcome


def messages(one: Planned) -> list[Outgoing]:
    return [
        message
        for place, entries in fan_out([one], 4).items()
        for batch in batches(entries, place, one.seq)
        for message in batch.messages
    ]
