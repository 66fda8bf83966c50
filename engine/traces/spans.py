"""What has a span, for how many there is room, and what each belongs to. `engine.traces.hopspans` makes them.

A process that exports spans has one `Spans`. One that does not has None, and looks for no context. Whoever needs it asks
`active()` once, when it is made.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from opentelemetry.trace import Span, SpanContext, Status, StatusCode

from engine import metrics
from engine.buckets import Buckets
from engine.traces.contexts import first_context
from engine.traces.names import ERROR, Hop

ERRORS_PER_SECOND: Final = 10
"""Spans of errors that nobody follows: a service that publishes nonsense must not crowd everything else out of the queue."""

SPANS_PER_SECOND: Final = 400
"""How many spans a process makes at most of what is followed: callers' libraries may have everything followed. A span of a hop
costs 0.03 ms of CPU with its export, so all of them 1 to 2 % of a core. A notification has two to four in a process, so that some
100 a second are followed."""

BURST_SECONDS: Final = 2
"""What was not made in so many seconds may be made at once: events come in batches."""

TENANTS: Final = 2
"""A tenant gets one of so many parts of it: who has everything followed leaves room for the others."""

NOBODY: Final = ""
"""In place of a tenant: whoever asks is not known yet. All of them together get what one tenant gets."""

Attributes = Mapping[str, str | int]

_OVER_TENANT = metrics.traces_unfollowed.labels("tenant")
_OVER_PROCESS = metrics.traces_unfollowed.labels("process")
_OVER_ERRORS = metrics.traces_unfollowed.labels("errors")


class SpanMaker(Protocol):
    """Makes spans: `engine.traces.hopspans.HopSpans`, which is loaded only where spans are exported."""

    def begin(
        self,
        hop: Hop,
        parent: SpanContext | None,
        links: Iterable[SpanContext],
        attributes: Attributes,
        since: int | None,
        first: SpanContext | None = None,
    ) -> Span:
        """As `HopSpans.begin`."""


class Spans:
    """Makes spans that are exported, whatever their parents say: whoever calls has decided, and has asked for `room`.

    Args:
        maker: makes them.
        one_in: of so many events that no publisher has decided about, one is followed.
        follow_seconds: what is older links to its origin, in a trace of its own.
        per_second: how many spans there is room for.
    """

    def __init__(
        self, maker: SpanMaker, *, one_in: int, follow_seconds: float, per_second: float = SPANS_PER_SECOND
    ) -> None:
        self._maker = maker
        self._one_in = one_in
        self._follow_nanoseconds = int(follow_seconds * 1e9)
        self._errors = Buckets(60 * ERRORS_PER_SECOND, burst=ERRORS_PER_SECOND)
        self._of_all, self._of_tenants = (
            Buckets(60 * rate, burst=BURST_SECONDS * rate) for rate in (per_second, per_second / TENANTS)
        )

    def room(self, tenant: str) -> bool:
        """Whether one more span may be made of what this tenant has followed; where not, it is counted as not followed.

        A span that says more about one that was made, and once only (an acknowledgement), need not ask again.

        Args:
            tenant: its token, as subjects have it, or `NOBODY`. A name beside it would be another tenant, with room of its own.
        """
        if not self._of_tenants.take(tenant):
            _OVER_TENANT.inc()
            return False
        if not self._of_all.take(NOBODY):
            self._of_tenants.give_back(tenant)
            _OVER_PROCESS.inc()
            return False
        return True

    def first(self, tenant: str, event_id: str, *, critical: bool) -> SpanContext | None:
        """The context of an event whose publisher has sent none; None: it is not followed. See `first_context`."""
        return first_context(tenant, event_id, self._one_in, always=critical)

    def by_chance(self) -> bool:
        """Whether to follow something that has neither a publisher nor an id."""
        return random.random() * self._one_in < 1

    def is_fresh(self, at: int, now: int) -> bool:
        """Whether what happens `now` belongs to the trace of what was `at`; both in Unix nanoseconds."""
        return now - at <= self._follow_nanoseconds

    def begin_first(self, hop: Hop, first: SpanContext, attributes: Attributes, since: int | None = None) -> Span:
        """The span that a trace begins with, under the ids that were found for it; without a span id under a random one."""
        return self._maker.begin(hop, None, (), attributes, since, first)

    def begin(
        self,
        hop: Hop,
        origin: SpanContext,
        attributes: Attributes,
        *,
        since: int | None = None,
        stored_at: int | None = None,
        within: Span | None = None,
        links: Iterable[SpanContext] = (),
    ) -> Span:
        """The span of a hop, which the caller ends.

        Args:
            origin: what it is about.
            since: when it began, in Unix nanoseconds; None: now.
            stored_at: since when the message that is worked on is stored, in Unix nanoseconds; None: just now.
            within: what it belongs to if it is too old to belong to the trace of its origin.
            links: other contexts that it has to do with.
        """
        if stored_at is None or self.is_fresh(stored_at, time.time_ns()):
            return self._maker.begin(hop, origin, links, attributes, since)
        parent = None if within is None else within.get_span_context()
        return self._maker.begin(hop, parent, (origin, *links), attributes, since)

    def begin_apart(
        self, hop: Hop, links: Iterable[SpanContext], attributes: Attributes, since: int | None = None
    ) -> Span:
        """A span in a trace of its own: that of a batch, or of a session."""
        return self._maker.begin(hop, None, links, attributes, since)

    def error(
        self,
        hop: Hop,
        origin: SpanContext | None,
        reason: str,
        attributes: Attributes,
        *,
        tenant: str = NOBODY,
        stored_at: int | None = None,
    ) -> SpanContext | None:
        """The span of something that failed just now, followed or not; its context. None: there were too many.

        What is followed takes of the room of its tenant; beyond that, and of what nobody follows, there are `ERRORS_PER_SECOND`.

        Args:
            reason: one word of few.
            tenant: as `room` has it.
            stored_at: as `begin` has it.
        """
        followed = origin is not None and origin.trace_flags.sampled
        if not (followed and self.room(tenant)) and not self._errors.take(""):
            _OVER_ERRORS.inc()
            return None
        if origin is None:
            span = self.begin_apart(hop, (), attributes)
        else:
            span = self.begin(hop, origin, attributes, stored_at=stored_at)
        failed(span, reason)
        span.end()
        return span.get_span_context()


def failed(span: Span, reason: str) -> None:
    """Say that what a span is about has failed. `reason` is one word of few."""
    span.set_attribute(ERROR, reason)
    span.set_status(Status(StatusCode.ERROR))


_active: Spans | None = None


def active() -> Spans | None:
    """The `Spans` of this process; None: it exports none."""
    return _active


def activate(spans: Spans | None) -> None:
    """From now on `active()` gives these spans. Whoever has asked before keeps what it was given."""
    global _active
    _active = spans
