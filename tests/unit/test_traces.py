"""Contexts are read and decided alike by everybody, spans hang where they belong, and a receiver keeps what it was sent."""

import json
import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState

from engine.broker.jetstream import Broker, Outgoing
from engine.channels.channel import Job
from engine.channels.references import References
from engine.channels.reports import Report
from engine.dispatch import rounds
from engine.dispatch.burials import store_letter
from engine.dispatch.following import FOLLOWED_USERS_MAX, not_followed, trace_in
from engine.dispatch.rounds import Dead, fan_out
from engine.dispatch.source import EVENTS
from engine.dispatch.spans import followed_dead, traced
from engine.errors import InvalidSetting, StepDown
from engine.jobs.claims import Done
from engine.letters.writing import store_job_letter
from engine.partition.reader import Delivered
from engine.settings import load_settings
from engine.traces import names
from engine.traces import spans as all_spans
from engine.traces.contexts import (
    as_version_00,
    context_of,
    first_context,
    followed_in,
    trace_line,
    traceparent_of,
    unfollowed,
)
from engine.traces.hopspans import Encoder
from engine.traces.messages import jobs_stored, receipts_stored
from engine.traces.spans import ERRORS_PER_SECOND, failed
from gateway.context import Context
from gateway.http.tracing import trace_of
from gateway.providers import following as reports
from ops.dev.spans import Link, Span, SpanStore, decode
from tests.support.spans import ORIGIN, PARENT, Collected, messages, planned, stored

IDS = st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255)


@given(*IDS)
def test_a_context_is_read_from_headers_as_it_was_written(trace_id: int, span_id: int, flags: int) -> None:
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    value = traceparent_of(context)
    for colon in (":", ": "):
        headers = f"NATS/1.0\r\nOther: 1\r\ntraceparent{colon}{value}\r\nLast: 2\r\n\r\n".encode()
        assert context_of(trace_in(headers)[0]) == context
        assert followed_in(headers) == (context if flags & 1 else None)
    less = context_of(unfollowed(value.encode()))
    assert less is not None
    assert (less.trace_id, less.span_id, less.trace_flags) == (trace_id, span_id, flags & ~1)
    assert trace_line(value) == (f"traceparent: {value}\r\n".encode() if flags & 1 else b"")


@given(st.binary(max_size=80))
def test_bytes_that_are_no_context_are_none(value: bytes) -> None:
    headers = b"NATS/1.0\r\ntraceparent: " + value + b"\r\n\r\n"
    for found in (context_of(trace_in(headers)[0]), followed_in(headers)):
        assert found is None or traceparent_of(found).encode()[3:-3] in value


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


# --- events -----------------------------------------------------------------------------------------------------------


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


LATER_VERSIONS = ["01" + PARENT[2:], "cc" + PARENT[2:-2] + "f1", "01" + PARENT[2:] + "-what-may-come"]


@pytest.mark.parametrize("value", LATER_VERSIONS)
def test_a_context_of_a_later_version_is_honoured_as_one_of_ours(value: str) -> None:
    assert as_version_00(value.encode()) == PARENT.encode()
    one = planned(stored(f"traceparent: {value}\r\n".encode()), Collected().spans)
    assert one.following is not None
    assert one.following.context == ORIGIN
    assert [message.headers for message in messages(one)] == [f"traceparent: {PARENT}\r\n".encode()]
    assert trace_of(make_mocked_request("POST", "/", {"traceparent": value})) == {"traceparent": PARENT}


@pytest.mark.parametrize("value", ["ff" + PARENT[2:], "01" + PARENT[2:] + "x", "1" + PARENT[2:], PARENT + "-more", ""])
def test_a_context_that_no_version_can_have_stays_as_it_is_and_is_none(value: str) -> None:
    assert as_version_00(value.encode()) == value.encode()
    assert context_of(as_version_00(value.encode())) is None


def test_a_context_under_a_name_with_a_capital_letter_goes_on_under_the_small_one() -> None:
    capital = f"Tracestate: vendor=1\r\nTraceparent: {PARENT}\r\n".encode()
    one = planned(stored(capital), Collected().spans)
    assert one.following is not None
    assert one.following.context == ORIGIN
    [record] = messages(one)
    assert record.headers == f"traceparent: {PARENT}\r\ntracestate: vendor=1\r\n".encode()
    both = stored(f"traceparent: {PARENT}\r\n".encode() + capital.replace(b"-01", b"-00"))
    assert planned(both, None).accepted.traceparent == PARENT.encode()


# --- dead letters and reports -----------------------------------------------------------------------------------------


class Stores:
    """A broker that takes everything."""

    def __init__(self) -> None:
        self.headers: list[Mapping[str, str]] = []
        self.messages: list[Outgoing] = []

    async def append(self, subject: str, payload: bytes, headers: Mapping[str, str], **_: object) -> None:
        self.headers.append(headers)

    async def commit(self, messages: Sequence[Outgoing]) -> None:
        self.messages += messages


async def test_the_letter_of_an_event_keeps_its_context_however_the_publisher_spells_it(collected: Collected) -> None:
    broker, event = Stores(), stored(f"Traceparent: 01{PARENT[2:]}\r\n".encode())
    await store_letter(cast("Broker", broker), Dead(event, "json", ""), 0, "epoch")
    assert broker.headers[0]["traceparent"] == PARENT
    dead = followed_dead(collected.spans, event.headers, "json")
    assert [one.context for one in collected.found] == [dead]
    assert dead.trace_id == ORIGIN.trace_id


async def test_the_letter_of_a_job_has_a_span_also_where_nobody_follows_it(
    collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_spans, "_active", collected.spans)
    now = datetime.now(UTC)
    for trace, stored_at in ((PARENT, now), ("", now), (PARENT, now - timedelta(hours=1))):
        job = Job(
            id="n",
            tenant="acme",
            user="alice",
            type="x",
            channel="email",
            first_at=now,
            stored_at=stored_at,
            trace=trace,
        )
        await store_job_letter(cast("Broker", Stores()), job, Done(0, "failed", "no_provider"))
    followed, unknown, old = collected.found
    assert ORIGIN is not None
    assert followed.parent.span_id == ORIGIN.span_id
    assert (unknown.parent, unknown.links) == (None, ())
    assert (old.parent, [link.context.span_id for link in old.links]) == (None, [ORIGIN.span_id])
    assert {(one.name, one.attributes[names.ERROR]) for one in collected.found} == {(names.BURY.title, "no_provider")}
    assert set(followed.attributes) <= names.ATTRIBUTES


async def test_what_a_provider_reports_has_a_span_in_the_trace_of_what_is_not_old(
    collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def all_of(_: Context, known: Any) -> list[Any]:
        return list(known)

    monkeypatch.setattr(all_spans, "_active", collected.spans)
    monkeypatch.setattr(reports, "_of_living_users", all_of)  # PostgreSQL says who lives
    now, references, broker = datetime.now(UTC), References(["s" * 40]), Stores()
    context = cast(
        "Any", SimpleNamespace(references=references, broker=broker, partition=lambda *_: SimpleNamespace(number=0))
    )
    for stored_at in (now, now - timedelta(hours=1)):
        job = Job(
            id="n",
            tenant="acme",
            user="alice",
            type="x",
            channel="email",
            first_at=now,
            stored_at=stored_at,
            trace=PARENT,
        )
        report = Report(state="delivered", reference=references.of(job), at=now, id="r", provider_id="m", address="")
        await reports.follow_reports(context, "ses", "email", [report])
    assert len(broker.messages) == 2
    fresh, old = collected.found
    assert ORIGIN is not None
    assert {one.name for one in collected.found} == {names.STORE_RECEIPT.title}
    assert (fresh.parent.span_id, old.parent) == (ORIGIN.span_id, None)
    assert [link.context.span_id for link in old.links] == [ORIGIN.span_id]


# --- the receiver -----------------------------------------------------------------------------------------------------


def span(trace: str, id: str, parent: str = "", start: int = 0, links: list[Link] | None = None) -> Span:
    return Span(trace, id, parent, f"span {id}", "internal", "s", "i", start, start + 5, {}, links or [], failed=False)


def test_what_the_exporter_encodes_is_decoded_as_it_was(collected: Collected) -> None:
    assert ORIGIN is not None
    made = collected.spans.begin(names.APPEND, ORIGIN, {names.MESSAGE_COUNT: 3}, since=1_000)
    made.add_link(ORIGIN)
    made.set_attribute(names.OUTCOME, "stored")
    failed(made, "full")
    made.end(2_000)
    made.end(3_000)
    [found] = decode(Encoder(Resource({}))(collected.found).SerializeToString())
    context = made.get_span_context()
    assert (found.trace_id, found.span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert (found.parent_id, found.kind, found.start, found.end) == ("b7ad6b7169203331", "producer", 1_000, 2_000)
    assert (found.name, found.attributes[names.MESSAGE_COUNT]) == (names.APPEND.title, 3)
    assert (found.failed, found.attributes[names.OUTCOME], found.attributes[names.ERROR]) == (True, "stored", "full")
    assert found.links == [Link(PARENT[3:35], PARENT[36:52])]
    with pytest.raises(ValueError, match="OTLP"):
        decode(b"\xff\xff nonsense")


def test_spans_of_hops_and_of_requests_are_encoded_as_opentelemetry_would(collected: Collected) -> None:
    assert ORIGIN is not None
    here, near = (
        collected.spans,
        SpanContext(7, 8, is_remote=False, trace_state=TraceState([("vendor", "x"), ("b", "y")])),
    )
    hops = [hop for hop in vars(names).values() if isinstance(hop, names.Hop)]
    for hop in hops:
        here.begin(hop, ORIGIN, {names.MESSAGE_COUNT: 3, names.TYPE: "über"}, links=[near, ORIGIN]).end()
        here.begin(hop, near, {}, since=5).end(9)
        apart = here.begin_apart(hop, [], {})
        failed(apart, "full")
        apart.end()
    resource = Resource({"service.name": "seamark-test", "n": 1}, "https://schema")
    requests = TracerProvider(resource=resource, shutdown_on_exit=False)
    requests.add_span_processor(SimpleSpanProcessor(collected.exporter))
    requests.get_tracer("test").start_span("GET /", attributes={"http.route": "/"}).end()
    made = collected.found
    assert len(made) == 3 * len(hops) + 1
    ours, theirs = Encoder(Resource({}))(made), encode_spans(made)
    assert sorted(map(str, ours.resource_spans)) == sorted(map(str, theirs.resource_spans))
    assert Encoder(Resource({}))(made[-1:]) == encode_spans(made[-1:])
    assert Encoder(resource)(made[:1]).resource_spans[0].resource == theirs.resource_spans[1].resource


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


def test_a_trace_state_whose_line_has_no_end_takes_no_header_of_the_server_with_it() -> None:
    """The server puts its own header where the publisher's line should have ended."""
    headers = f"NATS/1.0\r\ntraceparent: {PARENT}\r\ntracestate: a=bNats-Pin-Id: 8XsFz\r\n\r\n".encode()
    assert trace_in(headers) == (PARENT.encode(), None)
