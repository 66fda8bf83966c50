"""Lines of the log name the trace of the notification that is worked on, and no other line does."""

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog
from msgspec.structs import replace
from structlog.testing import capture_logs

from engine.channels.alarms import point_out
from engine.channels.channel import Job, Outcome
from engine.dispatch import rounds
from engine.dispatch.source import EVENTS
from engine.dispatch.spans import traced
from engine.errors import Unanswered
from engine.jobs.queue import PulledJob
from engine.jobs.worker import Worker
from engine.telemetry import _name_trace
from engine.traces import names
from engine.traces import spans as all_spans
from engine.traces.lines import about, about_followed
from engine.traces.messages import working
from gateway.api.events import Publishing
from gateway.session.traces import SessionTraces, reading
from seamark.protocol.events import Encoded
from tests.support.spans import ORIGIN, PARENT, Collected, stored

_log = structlog.get_logger("test")

FOLLOWED = f"traceparent: {PARENT}\r\n".encode()
THIS = (PARENT[3:35], PARENT[36:52])


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Collected:
    collected = Collected(one_in=10**9)
    monkeypatch.setattr(all_spans, "_active", collected.spans)
    return collected


@contextlib.contextmanager
def written() -> Iterator[list[Any]]:
    """The lines that are written in the block, with the ids that they name."""
    found: list[Any] = []
    with capture_logs(processors=[_name_trace]) as lines:
        yield found
    found += [(line["event"], line.get("trace_id"), line.get("span_id")) for line in lines]


def ids_of(span: Any) -> tuple[str, str]:
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


async def test_a_line_belongs_to_the_innermost_block_and_after_it_to_none_in_whatever_task() -> None:
    ended = asyncio.Event()

    async def shared() -> None:
        _log.info("within")
        await ended.wait()
        _log.info("afterwards")

    with written() as lines:
        with about(ORIGIN), about(None):
            task = asyncio.create_task(shared())
            await asyncio.sleep(0)
        ended.set()
        await task
        _log.info("outside")
    assert lines == [("within", *THIS), ("afterwards", None, None), ("outside", None, None)]


def test_where_no_spans_are_exported_lines_name_no_notification() -> None:
    with written() as lines, about_followed(PARENT):
        _log.info("quiet")
    assert lines == [("quiet", None, None)]


async def test_all_that_a_worker_says_while_it_handles_a_job_belongs_to_its_notification(collected: Collected) -> None:
    async def handle(pulled: PulledJob) -> None:
        point_out(pulled.job.channel, Outcome(kind="config", provider="p", code="x", known=False, alarm=True))
        raise RuntimeError

    broker = SimpleNamespace(settings=SimpleNamespace(inbox_prefix="_INBOX"))
    worker = Worker(cast("Any", broker), "email", cast("Any", SimpleNamespace(handle=handle)))
    job = Job(id="n", tenant="acme", user="u", type="x", channel="email", first_at=datetime.now(UTC), trace=PARENT)
    expected = ["provider_code_unknown", "provider_alarm", "job_not_handled"]
    for trace, ids in ((PARENT, THIS), (PARENT[:-1] + "0", (None, None)), ("", (None, None))):
        with written() as lines:
            await worker._handle(cast("Any", SimpleNamespace(job=replace(job, trace=trace))))
        assert lines == [(event, *ids) for event in expected]


def test_lines_of_a_round_belong_to_its_only_event_or_else_to_the_round(collected: Collected) -> None:
    for others, name in ((0, names.DISPATCH.title), (1, names.ROUND.title)):
        collected.exporter.clear()
        [round_] = rounds.rounds([stored(FOLLOWED), *[stored()] * others], "epoch", collected.spans)
        with written() as lines:
            with traced(collected.spans, EVENTS, 0, "epoch", round_.planned) or contextlib.nullcontext():
                _log.info("round")
            _log.info("next")
        [span] = [one for one in collected.found if one.name == name]
        assert lines == [("round", *ids_of(span)), ("next", None, None)]


def test_the_line_of_an_event_that_cannot_be_planned_belongs_to_it(
    collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "NotificationTemplate", None)
    for headers, ids in ((FOLLOWED, THIS), (b"", (None, None))):
        with written() as lines:
            [round_] = rounds.rounds([stored(headers)], "epoch", collected.spans)
        assert [dead.reason for dead in round_.dead] == ["internal"]
        assert lines == [("event_not_planned", *ids)]


def test_lines_of_a_batch_belong_to_its_message_if_it_is_the_only_one(collected: Collected) -> None:
    one = replace(stored(FOLLOWED), subject=b"log.0.acme.alice")
    for batch, ids in (
        ([one], THIS),
        ([one, one], (None, None)),
        ([replace(one, headers=b"NATS/1.0\r\n\r\n")], (None, None)),
    ):
        with written() as lines, working(collected.spans, names.FOLD, "inbox", "epoch", batch):
            _log.info("fold_failed")
        assert lines == [("fold_failed", *ids)]


async def test_an_event_that_a_gateway_cannot_store_and_a_read_mark_have_lines_of_their_spans(
    collected: Collected,
) -> None:
    async def append(*_: object, **__: object) -> None:
        raise Unanswered("away")

    publishing = cast("Any", SimpleNamespace(_spans=collected.spans, _events=SimpleNamespace(append=append)))
    with written() as lines, pytest.raises(Unanswered):
        await Publishing.store(publishing, Encoded("events.acme.k.x", b"{}", "acme:e", critical=True), {})
    [accept] = collected.found
    assert lines == [("event_not_stored", *ids_of(accept))]

    traces = SessionTraces(collected.spans, ("acme", "alice", "phone"))
    record = SimpleNamespace(skip=False, headers=b"NATS/1.0\r\n" + FOLLOWED, time="", body=b'{"id":"n"}')
    traces.delivered(1, cast("Any", record), "epoch")
    with written() as lines:
        for one, ids in ((traces, ["n"]), (traces, ["other"]), (None, ["n"])):
            with reading(one, ids, None):
                _log.warning("read_not_stored")
    assert lines == [("read_not_stored", *ids_of(collected.found[-1])), *[("read_not_stored", None, None)] * 2]
