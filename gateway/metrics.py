"""Every metric of gateways, declared in one place. See `engine.metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from prometheus_client import Counter, Gauge
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from gateway.join.port import FeedCounters

gateway_now_frames = Counter(
    "seamark_gateway_now_frames", "Now messages and broadcasts at sessions, by fate", ("fate",)
)
"""fate: sent, no_room (the socket was slow), early (the session had no `ready` yet)."""

gateway_broadcasts = Counter("seamark_gateway_broadcasts", "Broadcasts that reached this gateway, by fate", ("fate",))
"""fate: sent, invalid, throttled (too many of a tenant), overflow (too many waited)."""

gateway_sessions = Gauge("seamark_gateway_sessions", "Open sessions, by carrier", ("carrier",))
"""carrier: ws, sse, poll."""

gateway_joins = Counter("seamark_gateway_joins", "Logs joined, by result", ("result",))
"""result: resumed, or the reason of a reset: new, snapshot, epoch, future, trimmed."""

gateway_closed = Counter("seamark_gateway_closed_sessions", "Sessions ended, by close code", ("code",))
gateway_refused_tokens = Counter("seamark_gateway_refused_tokens", "Tokens not accepted, by reason", ("reason",))
gateway_problems = Counter(
    "seamark_gateway_problems", "Requests and handshakes refused, by the code of the problem", ("code",)
)
gateway_exhausted_looks = Counter(
    "seamark_gateway_exhausted_looks", "Looks, one a second, that found no file descriptor left for another connection"
)
gateway_receipts = Counter("seamark_gateway_receipts", "Receipts of the gateway, by fate", ("fate",))
"""fate: stored, dropped (the broker was away for too long, or they could not be stored), failed (a round that met a fault of
ours; it goes on)."""

gateway_state_records = Counter("seamark_gateway_state_records", "Read and archive records, by fate", ("fate",))
"""fate: stored, failed, refused_user and refused_tenant (the allowance is used up), refused_waiting."""

gateway_reports = Counter(
    "seamark_gateway_reports", "What providers have posted, by provider and what it says", ("provider", "says")
)
"""says: sent, delivered, failed; unmatched (of no message that we know); stop, start, help, answered (by a text)."""

gateway_events = Counter("seamark_gateway_events", "Events taken over HTTP, by outcome", ("outcome",))
"""outcome: accepted, duplicate, invalid, refused, throttled, unavailable, unanswered."""

gateway_idempotency_keys = Counter(
    "seamark_gateway_idempotency_keys", "Requests with an Idempotency-Key, by what was known of it", ("known",)
)
"""known: first, done (answered as before), running, other (another body), full (the tenant's allowance is used up), unkept
(Redis was away: carried out, and not remembered)."""

gateway_api_keys = Counter("seamark_gateway_api_keys", "API keys checked, by how", ("how",))
"""how: cached, queried, outlived (PostgreSQL did not answer, the cached entry went on), failed, guessed
(not looked up: too many invalid keys came from the address)."""


class FeedCollector(Collector):
    """Exports `FeedCounters` as `seamark_gateway_feed_events_total{event}`. Joins and resets have a metric of their own.

    They are read when metrics are asked for, never on the hot path.
    """

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
