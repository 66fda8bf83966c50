"""What feeds have met, as a metric: read from the shared counters when metrics are asked for, never on the hot path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from gateway.join.port import FeedCounters


class FeedCollector(Collector):
    """Exports `FeedCounters` as `seamark_gateway_feed_events_total{event}`. Joins and resets have a metric of their own."""

    def __init__(self, counters: FeedCounters) -> None:
        self._counters = counters

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Nothing in advance, so that a second gateway in one process (tests) may register its own."""
        return iter(())

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters as they stand."""
        family = CounterMetricFamily(
            "seamark_gateway_feed_events", "What joins of history and live have met, by kind", labels=("event",)
        )
        for field in fields(self._counters):
            value = getattr(self._counters, field.name)
            if isinstance(value, int):
                family.add_metric((field.name,), value)
        yield family
