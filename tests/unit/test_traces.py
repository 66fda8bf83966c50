"""Contexts are read and decided alike by everybody, spans hang where they belong, and a receiver keeps what it was sent."""

import functools
import json
import random
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from structlog.testing import capture_logs

from engine import metrics
from engine.broker.jetstream import Outgoing
from engine.buckets import Buckets
from engine.dispatch import rounds
from engine.dispatch.following import FOLLOWED_USERS_MAX, not_followed
from engine.dispatch.rounds import Planned, batches, fan_out, plan
from engine.dispatch.source import EVENTS
from engine.dispatch.spans import traced
from engine.errors import InvalidSetting, StepDown
from engine.partition.reader import Delivered
from engine.settings import load_settings
from engine.traces import names
from engine.traces.contexts import (
    context_in,
    context_of,
    first_context,
    followed_in,
    trace_line,
    traceparent_of,
    unfollowed,
)
from engine.traces.export import QUEUED_SPANS, Queue, Sampled, check_queue, provider_of_hops
from engine.traces.messages import jobs_stored, receipts_stored, working
from engine.traces.spans import ERRORS_PER_SECOND, Spans
from gateway.session.traces import RESUMED_MAX, SessionTraces
from ops.dev.spans import Link, Span, SpanStore, decode

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ORIGIN = context_of(PARENT)

IDS = st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255)


@given(*IDS)
def test_a_context_is_read_from_headers_as_it_was_written(trace_id: int, span_id: int, flags: int) -> None:
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    value = traceparent_of(context)
    for colon in (":", ": "):
        headers = f"NATS/1.0\r\nOther: 1\r\ntraceparent{colon}{value}\r\nLast: 2\r\n\r\n".encode()
        assert context_in(headers) == context
        assert followed_in(headers) == (context if flags & 1 else None)
    less = context_of(unfollowed(value.encode()))
    assert less is not None
    assert (less.trace_id, less.span_id, less.trace_flags) == (trace_id, span_id, flags & ~1)
    assert trace_line(value) == (f"traceparent: {value}\r\n".encode() if flags & 1 else b"")


@given(st.binary(max_size=80))
def test_bytes_that_are_no_context_are_none(value: bytes) -> None:
    found = context_in(b"NATS/1.0\r\ntraceparent: " + value + b"\r\n\r\n")
    assert found is None or traceparent_of(found).encode() in value


NO_CONTEXTS = [
    None, "", PARENT[:-1], f"{PARENT}x", PARENT.upper(), "00-" + "0" * 32 + PARENT[35:], PARENT[:36] + "0" * 16 + "-01",
    "01" + PARENT[2:],
]  # fmt: skip


@pytest.mark.parametrize("value", NO_CONTEXTS)
def test_a_context_that_is_not_valid_is_none_and_makes_no_header(value: str | None) -> None:
    assert context_of(value) is None
    assert trace_line(value or "") == b""


def test_no_header_is_smuggled_in_a_context() -> None:
    assert trace_line(f"{PARENT}\r\nNats-Rollup: all") == f"traceparent: {PARENT}\r\n".encode()


def test_everybody_decides_the_same_about_as_many_as_were_asked_for() -> None:
    found = [first_context("acme", f"event-{number}", 100) for number in range(20_000)]
    assert found == [first_context("acme", f"event-{number}", 100) for number in range(20_000)]
    assert 120 < sum(one is not None for one in found) < 280
    assert len({one.trace_id for one in found if one}) == sum(one is not None for one in found)
    assert first_context("acme", "event-0", 10**9) is None
    assert first_context("acme", "event-0", 10**9, always=True) == first_context("acme", "event-0", 1)
    assert first_context("other", "event-0", 1) != first_context("acme", "event-0", 1)


# --- spans ------------------------------------------------------------------------------------------------------------


class Collected:
    """Spans, and what they have exported."""

    def __init__(self, one_in: int = 100, follow_seconds: float = 300, per_second: float = 100_000) -> None:
        self.exporter = InMemorySpanExporter()
        provider, ids = provider_of_hops(Resource({}))
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.spans = Spans(
            provider.get_tracer("test"), ids, one_in=one_in, follow_seconds=follow_seconds, per_second=per_second
        )

    @property
    def found(self) -> list:
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def collected() -> Collected:
    return Collected()


def test_a_hop_is_a_child_of_what_is_fresh_and_links_to_what_is_old(collected: Collected) -> None:
    now = time.time_ns()
    assert ORIGIN is not None
    collected.spans.begin(names.DELIVER, ORIGIN, {}, stored_at=now - 299 * 10**9).end()
    collected.spans.begin(names.DELIVER, ORIGIN, {}, stored_at=now - 301 * 10**9).end()
    batch = collected.spans.begin_apart(names.RESUME, (), {})
    collected.spans.begin(names.DELIVER, ORIGIN, {}, stored_at=now - 301 * 10**9, within=batch).end()
    fresh, old, inside = collected.found
    assert (fresh.parent.span_id, fresh.context.trace_id, fresh.links) == (ORIGIN.span_id, ORIGIN.trace_id, ())
    assert (old.parent, old.context.trace_id != ORIGIN.trace_id) == (None, True)
    assert inside.parent.span_id == batch.get_span_context().span_id
    assert [[link.context.span_id for link in span.links] for span in (old, inside)] == [[ORIGIN.span_id]] * 2
    assert (fresh.name, fresh.kind) == ("deliver log.{partition}.{tenant}.{user}", SpanKind.CONSUMER)
    assert fresh.attributes["messaging.system"] == "nats"
    assert set(fresh.attributes) <= names.ATTRIBUTES


def test_jobs_that_follow_from_a_record_and_their_receipts_have_spans_where_it_is_followed(
    collected: Collected,
) -> None:
    now, old = time.time_ns(), time.time_ns() - 301 * 10**9
    jobs_stored(
        collected.spans,
        [
            (trace, stored_at, [Outgoing("job.push.normal.acme.alice", b"{}")] * count)
            for trace, stored_at, count in [
                (PARENT, now, 2),
                (unfollowed(PARENT.encode()).decode(), now, 3),
                (None, now, 4),
                (PARENT, old, 5),
            ]
        ],
        now,
    )
    about_jobs = collected.found
    receipts_stored(collected.spans, [Outgoing("rcpt.0.acme.alice", b"{}", trace_line(PARENT))], now, stored_at=old)
    assert [one.attributes[names.MESSAGE_COUNT] for one in about_jobs] == [2, 5]
    assert {one.name for one in about_jobs} == {"job job.{channel}.{lane}.{tenant}.{user}"}
    assert ORIGIN is not None
    assert [one.parent and one.parent.span_id for one in collected.found] == [ORIGIN.span_id, None, None]
    assert [[link.context.span_id for link in one.links] for one in collected.found] == [
        [],
        [ORIGIN.span_id],
        [ORIGIN.span_id],
    ]


def test_the_first_span_of_a_trace_has_the_ids_that_were_found_for_it_and_no_other_has(collected: Collected) -> None:
    first = collected.spans.first("acme", "event", critical=True)
    assert first is not None
    collected.spans.begin_first(names.DISPATCH, first, {}).end()
    collected.spans.begin_apart(names.ROUND, [first], {}).end()
    again = SpanContext(first.trace_id, 0, is_remote=True)
    collected.spans.begin_first(names.ACCEPT, again, {}).end()
    begun, other, accepted = collected.found
    assert (begun.context.trace_id, begun.context.span_id, begun.parent) == (first.trace_id, first.span_id, None)
    assert other.context.trace_id != first.trace_id
    assert (accepted.context.trace_id, accepted.context.span_id != first.span_id) == (first.trace_id, True)


def test_errors_that_nobody_follows_have_spans_within_a_bound(collected: Collected) -> None:
    told = [collected.spans.error(names.DISPATCH, None, "json", {}) for _ in range(3 * ERRORS_PER_SECOND)]
    assert ERRORS_PER_SECOND <= sum(one is not None for one in told) < 3 * ERRORS_PER_SECOND
    assert collected.spans.error(names.DISPATCH, ORIGIN, "json", {}) is not None, "what is followed is not counted"
    assert collected.found[-1].attributes["error.type"] == "json"


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


# --- events -----------------------------------------------------------------------------------------------------------


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


def test_an_event_without_a_context_is_followed_as_often_as_said_and_always_where_it_is_critical() -> None:
    few, all_ = Collected(one_in=10**9).spans, Collected(one_in=1).spans
    event = stored()
    assert planned(event, few).following is None
    assert messages(planned(event, few)) == messages(planned(event, None)), "what is not followed costs nothing"
    for one in (planned(event, all_), planned(stored(priority="critical"), few)):
        assert one.following is not None
        assert one.following.begins
        [record] = messages(one)
        assert json.loads(record.payload)["trace"] == traceparent_of(one.following.context)
    assert messages(planned(event, all_)) == messages(planned(event, all_)), "dispatched again it gives equal bytes"


@pytest.mark.parametrize("sampled", [True, False])
def test_what_the_publisher_has_decided_is_obeyed_whatever_is_said_here(sampled: bool) -> None:
    parent = PARENT if sampled else PARENT[:-1] + "0"
    for one_in in (1, 10**9):
        one = planned(stored(f"traceparent: {parent}\r\n".encode(), priority="critical"), Collected(one_in).spans)
        assert (one.following is not None) is sampled
        [record] = messages(one)
        assert json.loads(record.payload)["trace"] == parent
        assert record.headers == f"traceparent: {parent}\r\n".encode()


@pytest.mark.parametrize("users", [1, 16, 17, 31, 1000, 10_000])
def test_of_an_event_for_many_users_a_few_are_followed_on(users: int) -> None:
    event = stored(f"traceparent: {PARENT}\r\n".encode(), to=[f"u{number}" for number in range(users)])
    records = messages(planned(event, Collected().spans))
    followed = [record for record in records if followed_in(b"\r\n" + record.headers)]
    assert len(records) == users
    assert min(users, FOLLOWED_USERS_MAX) / 2 <= len(followed) <= FOLLOWED_USERS_MAX
    assert {json.loads(record.payload)["trace"] for record in followed} == {PARENT}


@given(st.text(max_size=30), st.sampled_from([None, "tx", '"trace":"00-', PARENT]), st.booleans())
def test_a_record_that_is_not_followed_on_differs_in_its_context_alone(
    text: str, transaction: str | None, nested: bool
) -> None:
    data = {"trace": PARENT, "text": f'"trace":"{PARENT}" {text}'} if nested else text
    more = {} if transaction is None else {"transaction_id": transaction}
    [record] = messages(planned(stored(f"traceparent: {PARENT}\r\n".encode(), data=data, **more), Collected().spans))
    less = not_followed(record)
    before, after = json.loads(record.payload), json.loads(less.payload)
    assert after.pop("trace") == PARENT[:-1] + "0"
    assert before.pop("trace") == PARENT
    assert before == after
    assert less.headers == record.headers.replace(PARENT.encode(), PARENT[:-1].encode() + b"0")


def test_a_round_links_to_every_event_that_is_followed_and_each_of_these_links_back(collected: Collected) -> None:
    parents = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 501)]
    events = [
        Delivered(b"ev.0.default.k.demo.hello", seq, time.time_ns(), f"NATS/1.0\r\ntraceparent: {parent}\r\n\r\n".encode(),
                  json.dumps({"id": f"e{seq}", "to": ["alice"]}).encode())
        for seq, parent in enumerate(parents, 1)
    ]  # fmt: skip
    [*quiet] = [stored(), stored()]
    [round_] = rounds.rounds([*events, *quiet], "epoch", collected.spans)
    with traced(collected.spans, EVENTS, 0, "epoch", round_.planned) as spans:
        entries = fan_out(round_.planned, 4)
        for place, each in entries.items():
            spans.appended(place, each, time.time_ns())
        spans.settled(round_.planned[1:], [], [])
    found = {span.name: [one for one in collected.found if one.name == span.name] for span in collected.found}
    [batch] = found[names.ROUND.title]
    assert [link.context.trace_id for link in batch.links] == list(range(1, 501))
    assert batch.attributes[names.MESSAGE_COUNT] == 502
    dispatched = found[names.DISPATCH.title]
    assert [span.parent.span_id for span in dispatched] == list(range(1, 501))
    assert {link.context.span_id for span in dispatched for link in span.links} == {batch.context.span_id}
    assert [span.attributes[names.OUTCOME] for span in dispatched] == ["duplicate", *["appended"] * 499]
    assert sorted(span.parent.span_id for span in found[names.APPEND.title]) == sorted(
        span.context.span_id for span in dispatched
    )


def test_a_round_that_fails_says_so_in_its_spans(collected: Collected) -> None:
    [round_] = rounds.rounds([stored(f"traceparent: {PARENT}\r\n".encode())], "epoch", collected.spans)
    spans = traced(collected.spans, EVENTS, 0, "epoch", round_.planned)
    assert spans is not None
    with pytest.raises(StepDown), spans:
        raise StepDown("somebody else")
    assert [(span.name, span.attributes["error.type"]) for span in collected.found] == [
        (names.DISPATCH.title, "StepDown"),
        (names.ROUND.title, "StepDown"),
    ]


def test_rounds_look_for_contexts_only_where_spans_are_made() -> None:
    [quiet] = rounds.rounds([stored(f"traceparent: {PARENT}\r\n".encode())], "epoch")
    assert quiet.planned[0].following is None
    [followed] = rounds.rounds([stored(f"traceparent: {PARENT}\r\n".encode())], "epoch", Collected().spans)
    assert followed.planned[0].following is not None


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
    assert full.found == []


# --- sessions ---------------------------------------------------------------------------------------------------------


class Sent:
    """A record as `SessionTraces` looks at it."""

    skip = False
    body = b'{"id":"n"}'

    def __init__(self, number: int, parent: str = PARENT, stored_at: str = "") -> None:
        self.headers, self.time = f"NATS/1.0\r\ntraceparent: {parent}\r\n\r\n".encode(), stored_at
        self.body = f'{{"id":"n{number}"}}'.encode()


def test_a_device_that_missed_much_has_a_resume_that_says_how_much_and_spans_of_a_few(collected: Collected) -> None:
    session, before = SessionTraces(collected.spans, "acme"), counted("resume")
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
    session = SessionTraces(full.spans, "acme")
    session.delivered(1, Sent(1), "epoch")
    session.acknowledged(1)
    session.caught_up()
    assert session.reading(["n1"], None) is None
    assert session.newest(0, 1) is None
    assert full.found == []


# --- the receiver -----------------------------------------------------------------------------------------------------


def span(trace: str, id: str, parent: str = "", start: int = 0, links: list[Link] | None = None) -> Span:
    return Span(trace, id, parent, f"span {id}", "internal", "s", "i", start, start + 5, {}, links or [], failed=False)


def test_what_the_exporter_encodes_is_decoded_as_it_was(collected: Collected) -> None:
    assert ORIGIN is not None
    made = collected.spans.begin(names.APPEND, ORIGIN, {names.MESSAGE_COUNT: 3}, since=1_000)
    made.add_link(ORIGIN)
    made.end(2_000)
    [found] = decode(encode_spans(collected.found).SerializeToString())
    context = made.get_span_context()
    assert (found.trace_id, found.span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert (found.parent_id, found.kind, found.start, found.end) == ("b7ad6b7169203331", "producer", 1_000, 2_000)
    assert (found.name, found.attributes[names.MESSAGE_COUNT]) == (names.APPEND.title, 3)
    assert found.links == [Link(PARENT[3:35], PARENT[36:52])]
    with pytest.raises(ValueError, match="OTLP"):
        decode(b"\xff\xff nonsense")


def test_a_trace_is_shown_with_the_spans_that_link_to_it_until_it_is_too_old() -> None:
    store = SpanStore(seconds=10)
    store.add([span("a", "1", start=3), span("a", "2", "1", start=4)], now=100)
    store.add([span("b", "3", start=1, links=[Link("a", "1")]), span("b", "4", start=2)], now=105)
    assert [one.span_id for one in store.trace("a")] == ["3", "1", "2"]
    assert [(one.trace_id, one.name, one.spans) for one in store.overviews()] == [
        ("b", "span 3", 2),
        ("a", "span 1", 2),
    ]
    store.add([], now=112)
    assert [one.span_id for one in store.trace("a")] == ["3"]
    assert [one.trace_id for one in store.overviews()] == ["b"]
    store.add([], now=200)
    assert (store.overviews(), store._count, dict(store._linked)) == ([], 0, {})


def test_a_receiver_never_keeps_more_than_its_bound() -> None:
    store, dice = SpanStore(spans_max=50), random.Random(7)
    for number in range(2_000):
        trace = f"t{dice.randrange(40)}"
        store.add([span(trace, str(number), links=[Link(f"t{dice.randrange(40)}", "x")])], now=number)
        assert store._count == sum(len(spans) for spans in store._traces.values()) <= 50
        assert store._count > 0
        assert {one for linking in store._linked.values() for one in linking} <= store._traces.keys()


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
    provider, ids = provider_of_hops(Resource({}))
    provider.add_span_processor(queue)
    spans = Spans(provider.get_tracer("test"), ids, one_in=1, follow_seconds=300)
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
    queue.end()


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


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SEAMARK_TRACES_ENDPOINT", "collector:4317"),
        ("SEAMARK_TRACE_ONE_IN", "0"),
        ("SEAMARK_TRACE_FOLLOW_SECONDS", "0"),
        ("SEAMARK_TRACE_URL", "https://traces.example.com/"),
        ("SEAMARK_TRACE_URL", "javascript:{trace_id}"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(variable: str, value: str) -> None:
    with pytest.raises(InvalidSetting, match=variable):
        load_settings({variable: value})


@pytest.mark.parametrize("value", ["", "0", "-1", "5s", "1.5", "²", "9" * 5000])
@pytest.mark.parametrize("variable", ["OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"])
def test_a_variable_of_the_queue_that_makes_no_sense_is_refused_by_its_name(variable: str, value: str) -> None:
    check_queue({variable: "500"})
    with pytest.raises(InvalidSetting, match=variable):
        check_queue({variable: value})
