"""However much callers have followed, a process makes few spans, and says which are missing."""

import functools
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import NonRecordingSpan, set_span_in_context
from structlog.testing import capture_logs

from engine import metrics
from engine.broker.jetstream import Outgoing
from engine.buckets import Buckets
from engine.dispatch import rounds
from engine.dispatch.rounds import fan_out
from engine.dispatch.source import EVENTS
from engine.dispatch.spans import traced
from engine.errors import InvalidSetting
from engine.traces import names
from engine.traces.contexts import context_of, trace_line, unfollowed
from engine.traces.export import QUEUED_SPANS, Queue, Sampled, check_queue
from engine.traces.hopspans import HopSpans
from engine.traces.messages import jobs_stored, receipts_stored, working
from engine.traces.spans import Spans
from gateway.http.tracing import accepting
from gateway.session.traces import RESUMED_MAX, SessionTraces
from seamark.protocol.events import Encoded
from tests.support.spans import ORIGIN, PARENT, Collected, messages, planned, stored


def counted(reason: str) -> float:
    return metrics.traces_unfollowed.labels(reason)._value.get()


def test_a_tenant_has_half_of_what_a_process_follows_and_nobody_has_more_than_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Buckets, "__init__", functools.partialmethod(Buckets.__init__, now=lambda: 0.0))
    spans, tenant, process = Collected(per_second=10).spans, counted("tenant"), counted("process")
    assert [spans.room("greedy") for _ in range(25)] == [True] * 10 + [False] * 15
    assert [spans.room("b") for _ in range(8)] == [True] * 8
    assert [spans.room("c") for _ in range(5)] == [True] * 2 + [False] * 3
    assert (counted("tenant") - tenant, counted("process") - process) == (15, 3)
    assert spans.error(names.DISPATCH, ORIGIN, "json", {}, tenant="greedy") is not None, "as one that nobody follows"


def test_an_event_that_there_is_no_room_to_follow_gives_the_same_records_and_no_span() -> None:
    full, event = Collected(per_second=0.001), stored(f"traceparent: {PARENT}\r\n".encode())
    [round_] = rounds.rounds([event], "epoch", full.spans)
    assert traced(full.spans, EVENTS, 0, "epoch", round_.planned) is None
    assert messages(round_.planned[0]) == messages(planned(event, Collected().spans))
    now = time.time_ns()
    jobs_stored(full.spans, [(PARENT, now, [Outgoing("job.push.normal.acme.alice", b"{}")])], now)
    receipts_stored(full.spans, [Outgoing("rcpt.0.acme.alice", b"{}", trace_line(PARENT))], now)
    with working(
        full.spans, names.FOLD, "unread", "epoch", [msgspec.structs.replace(event, subject=b"log.0.acme.alice")]
    ):
        pass
    for caller in ({"traceparent": PARENT}, {}):
        with accepting(full.spans, caller, Encoded("events.acme.k.x", b"{}", "acme:e", critical=True)) as headers:
            assert headers == caller, "dispatchers decide for themselves"
    assert full.found == []


def test_a_dispatcher_says_of_an_event_only_so_many_places_as_there_is_room_for() -> None:
    one_left = Collected(per_second=1)  # for a tenant, at once
    [round_] = rounds.rounds([stored(f"traceparent: {PARENT}\r\n".encode())], "epoch", one_left.spans)
    followed = traced(one_left.spans, EVENTS, 0, "epoch", round_.planned)
    assert followed is not None
    with followed:
        for place, entries in fan_out(round_.planned, 4).items():
            followed.appended(place, entries, time.time_ns())
        followed.settled(round_.planned, [], [])
    assert {one.name for one in one_left.found} == {names.ROUND.title, names.DISPATCH.title}


# --- sessions ---------------------------------------------------------------------------------------------------------


class Sent:
    """A record as `SessionTraces` looks at it."""

    skip = False

    def __init__(self, number: int, parent: str = PARENT, stored_at: str = "") -> None:
        self.headers, self.time = f"NATS/1.0\r\ntraceparent: {parent}\r\n\r\n".encode(), stored_at
        self.body = f'{{"id":"n{number}"}}'.encode()


def test_a_device_that_missed_much_has_a_resume_that_says_how_much_and_spans_of_a_few() -> None:
    collected = Collected()
    session, before = SessionTraces(collected.spans, ("acme", "alice", "phone")), counted("resume")
    missed = datetime.now(UTC).isoformat()
    session.adopted("resumed")
    for seq in range(1, 101):
        session.delivered(seq, Sent(seq, PARENT if seq % 2 else PARENT[:-1] + "0", missed), "epoch")
    session.acknowledged(100)
    session.caught_up()
    session.delivered(101, Sent(101), "epoch")
    found = {
        title: [one for one in collected.found if one.name == title] for title in {s.name for s in collected.found}
    }
    assert len(found[names.DELIVER.title]) == RESUMED_MAX + 1, "afterwards everything is followed again"
    assert counted("resume") - before == 50 - RESUMED_MAX
    [resume] = found[names.RESUME.title]
    assert resume.attributes[names.MESSAGE_COUNT] == 100


def test_a_delivery_without_a_span_leaves_nothing_to_say_about_it() -> None:
    full = Collected(per_second=0.001, one_in=10**9)
    session = SessionTraces(full.spans, ("acme", "alice", "phone"))
    session.delivered(1, Sent(1), "epoch")
    session.acknowledged(1)
    session.caught_up()
    assert session.read(["n1"], None) is None
    assert session.newest(0, 1) is None
    assert full.found == []


def test_read_marks_have_spans_only_where_there_is_room() -> None:
    """A device that marks one followed record again and again would fill the queue of spans for everybody."""
    collected = Collected(per_second=4)  # four for a tenant, at once
    session = SessionTraces(collected.spans, ("acme", "alice", "phone"))
    session.caught_up()
    session.delivered(1, Sent(1), "epoch")
    marks = [session.read(["n1"], None) for _ in range(100)]
    for span in marks:
        if span is not None:
            span.end()
    assert 1 <= sum(one.name == names.READ.title for one in collected.found) <= 4


# --- the way to a collector -------------------------------------------------------------------------------------------


class Stuck(SpanExporter):
    """A collector that answers only once it is let, and takes nothing then."""

    def __init__(self) -> None:
        self.asked, self.let = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        assert self.let.wait(60)
        return SpanExportResult.FAILURE


def lost(reason: str) -> float:
    return metrics.traces_lost.labels(reason)._value.get()


def test_spans_that_no_collector_gets_are_counted_and_said_once_in_a_while() -> None:
    collector, before = Stuck(), {reason: lost(reason) for reason in ("full", "refused")}
    queue = Queue(collector)
    spans = Spans(HopSpans(Resource({}), queue.on_end), one_in=1, follow_seconds=300)
    made = 512  # so many wake it up
    with capture_logs() as lines:
        for _ in range(made):
            spans.begin_apart(names.RESUME, (), {}).end()
        assert collector.asked.wait(30)
        while queue.waiting < QUEUED_SPANS:
            spans.begin_apart(names.RESUME, (), {}).end()
            made += 1
        for _ in range(10):
            spans.begin_apart(names.RESUME, (), {}).end()
        assert lost("full") - before["full"] == 10
        collector.let.set()
        assert queue.force_flush()
        assert (queue.waiting, lost("refused") - before["refused"]) == (0, made)
    assert [(line["event"], line["reason"]) for line in lines] == [("spans_lost", "full"), ("spans_lost", "refused")]
    collector.let.clear()
    before["end"] = lost("end")
    for _ in range(made):
        spans.begin_apart(names.RESUME, (), {}).end()
    queue.end()
    assert sum(lost(reason) - count for reason, count in before.items()) == 2 * made + 10, "nothing goes without a word"
    collector.let.set()


def test_requests_are_followed_as_their_callers_say_while_there_is_room() -> None:
    for per_second, expected in ((100_000, 50), (10, 10)):
        spans = Collected(per_second=per_second).spans
        provider = TracerProvider(Sampled(spans, 10**9), shutdown_on_exit=False)
        tracer = provider.get_tracer("test")
        sampled = [
            tracer.start_span("GET", set_span_in_context(NonRecordingSpan(ORIGIN))).is_recording() for _ in range(50)
        ]
        assert expected <= sum(sampled) <= max(expected, 49)
        less = NonRecordingSpan(context_of(unfollowed(PARENT.encode())))
        assert not tracer.start_span("GET", set_span_in_context(less)).is_recording()


@pytest.mark.parametrize("value", ["", "0", "-1", "5s", "1.5", "²", "9" * 5000])
@pytest.mark.parametrize("variable", ["OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"])
def test_a_variable_of_the_queue_that_makes_no_sense_is_refused_by_its_name(variable: str, value: str) -> None:
    check_queue({variable: "500"})
    with pytest.raises(InvalidSetting, match=variable):
        check_queue({variable: value})
