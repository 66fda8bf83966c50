"""The spans of a dispatcher's round that has events which are followed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, Self

from opentelemetry.trace import Span, SpanContext

from engine.dispatch.following import trace_in
from engine.dispatch.later import PutOff
from engine.dispatch.rounds import Dead, Entry, Planned
from engine.dispatch.source import BULK, EVENTS, LATER_PLACE, EventSource, Place
from engine.traces import names
from engine.traces.contexts import context_of
from engine.traces.lines import about
from engine.traces.spans import Spans, failed
from seamark.protocol.subjects import dispatch_consumer

_DESTINATIONS: Final = {EVENTS: names.EVENT, BULK: names.BULK}


def followed_dead(spans: Spans | None, headers: bytes, reason: str) -> SpanContext | None:
    """Make the span of an event that became a dead letter, followed or not; gives its context, if it has one."""
    if spans is None:
        return None
    return spans.error(names.DISPATCH, context_of(trace_in(headers)[0]), reason, {names.OUTCOME: "dead"})


def traced(
    spans: Spans | None, source: EventSource, event_partition: int, epoch: str, planned: Sequence[Planned]
) -> RoundSpans | None:
    """The spans of a round; None: it has no event that is followed, or there is no room for more spans."""
    if spans is None:
        return None
    found = [one for one in planned if one.following is not None and spans.room(one.accepted.at.tenant_token)]
    return RoundSpans(spans, source, event_partition, epoch, len(planned), found) if found else None


class RoundSpans:
    """The spans of a round: its own, one of each followed event, and one of each of their appends to a place.

    As a context manager it ends them; where the round fails they say so. Lines of the log belong meanwhile to the event if it is
    the only one, else to the round.
    """

    def __init__(
        self,
        spans: Spans,
        source: EventSource,
        event_partition: int,
        epoch: str,
        events: int,
        followed_events: Iterable[Planned],
    ) -> None:
        self._spans = spans
        self._events: dict[tuple[int, str], Span] = {}
        self._tenants: dict[tuple[int, str], str] = {}
        since, destination = time.time_ns(), _DESTINATIONS.get(source, names.LATER)
        told = {names.GROUP: dispatch_consumer(event_partition)}
        each = [(one, one.following) for one in followed_events if one.following is not None]
        self._round = spans.begin_apart(
            names.ROUND._replace(destination=destination),
            [follow.context for _, follow in each],
            {**told, names.MESSAGE_COUNT: events},
            since,
        )
        hop = names.DISPATCH._replace(destination=destination)
        for one, follow in each:
            said = {
                **told,
                names.MESSAGE_ID: f"{epoch}.{one.seq}",
                names.TENANT: one.accepted.at.tenant,
                names.TYPE: one.accepted.at.type,
                names.PRIORITY: one.accepted.event.priority,
            }
            if follow.begins:
                span = spans.begin_first(hop, follow.context, said, since)
                span.add_link(self._round.get_span_context())
            else:
                span = spans.begin(
                    hop, follow.context, said, since=since, stored_at=follow.stored_at, within=self._round,
                    links=[self._round.get_span_context()],
                )  # fmt: skip
            self._events[one.seq, one.part] = span
            self._tenants[one.seq, one.part] = one.accepted.at.tenant_token
        # Nearly none of a round's events and entries is followed: one look at its sequence tells.
        self._seqs = {seq for seq, _ in self._events}
        lines_of = self._round if events > 1 else next(iter(self._events.values()))
        self._lines = about(lines_of.get_span_context())

    def appended(self, place: Place, entries: Iterable[Entry | PutOff], since: int) -> None:
        """These entries are stored in a place; `since` is when that was begun, in Unix nanoseconds."""
        counts, seqs = dict[tuple[int, str], int](), self._seqs
        for entry in entries:
            if entry.seq in seqs and (key := (entry.seq, entry.event_part)) in self._events:
                counts[key] = counts.get(key, 0) + 1
        hop = names.PUT_OFF if place == LATER_PLACE else names.APPEND
        for key, count in counts.items():
            if not self._spans.room(self._tenants[key]):
                continue  # an event for very many users is appended in every partition
            parent = self._events[key].get_span_context()
            self._spans.begin(hop, parent, {names.MESSAGE_COUNT: count}, since=since).end()

    def settled(self, appended: Iterable[Planned], put_off: Iterable[Planned], dead: Iterable[Dead]) -> None:
        """What became of the events; what is in none of these was published before."""
        seqs = self._seqs
        outcomes: dict[tuple[int, str], str] = {
            (one.seq, one.part): one.template.withheld or "appended" for one in appended if one.seq in seqs
        }
        outcomes |= {(one.seq, one.part): "put_off" for one in put_off if one.seq in seqs}
        outcomes |= {(one.delivered.seq, ""): "dead" for one in dead}
        for key, span in self._events.items():
            span.set_attribute(names.OUTCOME, outcomes.get(key, "duplicate"))

    def __enter__(self) -> Self:
        self._lines.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.__exit__(kind, error, traceback)
        for span in (*self._events.values(), self._round):
            if kind is not None:
                failed(span, kind.__name__)
            span.end()
