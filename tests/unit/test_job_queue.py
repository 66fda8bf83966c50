"""What a worker reads from the broker's words about a job."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from engine.channels.channel import Job
from engine.jobs import queue
from engine.jobs.messages import times_put_back, unreadable_job
from engine.jobs.queue import PULL_LOST_SECONDS, PulledLane, PulledUnreadable, deliveries_of


@pytest.mark.parametrize(
    "reply",
    [
        b"$JS.ACK.JOBS.push-normal.3.17.9.1795478400000000000.4",
        b"$JS.ACK._.ABCDEF.JOBS.push-normal.3.17.9.1795478400000000000.4.random",
    ],
)
def test_the_subject_of_the_acknowledgement_says_how_often_a_job_was_handed_out(reply: bytes) -> None:
    """In the short form, and in the one with a domain and an account (nats-server's ADR-15)."""
    assert deliveries_of(reply) == 3


JOB = msgspec.json.encode(
    Job(id="n", tenant="t", user="u", type="a", channel="push", first_at=datetime(2026, 1, 1, tzinfo=UTC))
)
REPLY = b"$JS.ACK.JOBS.push-normal.1.17.9.1795478400000000000.4"


class FakeBroker:
    """Notes what is ordered, and brings it to who is subscribed."""

    settings = SimpleNamespace(inbox_prefix="_INBOX")

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[..., None]] = {}
        self.drained = asyncio.Event()
        self.orders: list[str] = []
        self.told: list[tuple[str | bytes, bytes]] = []
        self.stored: list[tuple[str, bytes, dict[str, str]]] = []

    def subscribe(self, subject: str, handler: Callable[..., None]) -> Any:
        self.handlers[subject] = handler
        return SimpleNamespace(unsubscribe=lambda: self.handlers.pop(subject), drain=self.drained.wait)

    def publish(self, subject: str | bytes, payload: bytes, *, reply: str = "") -> None:
        if reply:
            self.orders.append(reply)
        else:
            self.told.append((subject, payload))

    async def request(self, subject: str, payload: bytes) -> None:
        self.told.append((subject, payload))

    async def append(self, subject: str, payload: bytes, headers: dict[str, str], *, msg_id: str) -> None:
        assert msg_id == subject
        self.stored.append((subject, payload, headers))

    def bring(self, order: str, headers: bytes = b"") -> None:
        if (handler := self.handlers.get(order)) is not None:
            handler(b"job.push.normal.t.u", REPLY, headers, JOB)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


def ordering(broker: FakeBroker) -> PulledLane:
    lane = PulledLane(broker, "push", "normal", lambda: None, lambda unreadable: None)  # type: ignore[arg-type]
    lane._renew()
    lane.order(2)
    return lane


def test_a_job_that_waited_for_a_process_that_stood_still_is_as_old_as_its_order(clock: SimpleNamespace) -> None:
    broker = FakeBroker()
    lane = ordering(broker)
    clock.seconds += 3
    broker.bring(broker.orders[0])
    assert lane.waiting[0].held_seconds == 3
    clock.seconds += 70
    broker.bring(broker.orders[0])
    assert lane.waiting[1].held_seconds == 73


def test_what_an_order_brings_that_was_given_up_is_not_taken(clock: SimpleNamespace) -> None:
    """Nobody would know how old it is. It is handed out again."""
    broker = FakeBroker()
    lane = ordering(broker)
    clock.seconds += PULL_LOST_SECONDS + 1
    lane.order(2)
    lost, ordered = broker.orders
    broker.bring(lost)
    assert not lane.waiting
    broker.bring(ordered)
    assert lane.waiting[0].held_seconds == 0


async def test_a_lane_that_is_closed_takes_what_is_on_its_way_as_old_as_it_is_and_listens_to_nothing_new(
    clock: SimpleNamespace,
) -> None:
    """Also where the consumer's leader changes at that moment, for which an open lane orders anew."""
    broker = FakeBroker()
    lane = ordering(broker)
    [order] = broker.orders
    closing = asyncio.create_task(lane.close(), name="close")
    await asyncio.sleep(0)  # a turn: it has begun to drain
    clock.seconds += 3
    broker.handlers[order](b"", b"", b"NATS/1.0 409 Leadership Change\r\n\r\n", b"")
    broker.bring(order)
    assert lane.waiting[0].held_seconds == 3
    assert list(broker.handlers) == [order]
    broker.drained.set()
    await closing


@pytest.mark.parametrize("payload", [b'{"id":"n","type":"a","first_at":17,"attempt":2}', b"[]", b"{", b"\xff"])
def test_what_cannot_be_read_is_no_job_and_is_known_by_what_can_be_said_of_it(payload: bytes) -> None:
    aside: list[Any] = []
    broker = FakeBroker()
    lane = PulledLane(broker, "push", "normal", lambda: None, aside.append)  # type: ignore[arg-type]
    lane._renew()
    lane.order(2)
    broker.handlers[broker.orders[-1]](b"job.push.normal.acme.ann=40example=2Ecom", REPLY, b"", payload)
    assert not lane.waiting
    [pulled] = aside
    assert pulled.unreadable.payload == payload
    assert pulled.times == 0
    job = pulled.unreadable.job
    assert (job.tenant, job.user, job.channel) == ("acme", "ann@example.com", "push")
    assert (job.id, job.type, job.attempt) == (("n", "a", 2) if payload.startswith(b'{"id') else ("", "", 0))


def test_what_cannot_be_read_is_pulled_as_fast_as_jobs_and_one_line_says_so() -> None:
    news: list[int] = []
    broker = FakeBroker()
    lane = PulledLane(broker, "push", "normal", lambda: news.append(1), lambda unreadable: None)  # type: ignore[arg-type]
    lane._renew()
    with capture_logs() as logs:
        for number in range(200):
            lane.order(2)
            reply = REPLY.replace(b".1.17.", b".%d.%d." % (1 + number % 2, number))
            broker.handlers[broker.orders[-1]](b"job.push.normal.t.u", reply, b"", b"[]")
            assert len(news) == number + 1
    assert [(line["event"], line["count"]) for line in logs] == [("job_unreadable", 1)], "however many there are"


async def test_what_cannot_be_read_is_put_back_as_it_stands() -> None:
    broker, payload = FakeBroker(), b'{"id":"n","newer":"\xff"}'
    subject, own = b"job.push.bulk.acme.ann=40x", b"Seamark-Put-Back:3\r\nX-Newer:yes\r\n"
    headers = b"NATS/1.0\r\nNats-Scheduler: jobsched.x\r\n" + own + b"\r\n"
    unreadable = unreadable_job("push", subject, payload)
    pulled = PulledUnreadable(broker, REPLY, subject, headers, unreadable, times_put_back(headers))  # type: ignore[arg-type]
    await pulled.put_back(600)
    [(schedule, stored, kept)] = broker.stored
    assert schedule.startswith("jobsched.push.acme.ann=40x.")
    assert stored == payload
    at = datetime.fromisoformat(kept.pop("Nats-Schedule").removeprefix("@at "))
    assert timedelta(seconds=590) < at - datetime.now(UTC) < timedelta(seconds=610)
    assert kept == {"Nats-Schedule-Target": subject.decode(), "X-Newer": "yes", "Seamark-Put-Back": "4"}
    assert broker.told == [(REPLY.decode(), b"+TERM")]


@pytest.mark.parametrize(
    ("value", "times"),
    [(b"", 0), (b"0", 0), (b"17", 17), (b" 3 ", 3), (b"-1", 0), (b"x", 0), (b"1e9", 0), (b"9" * 5000, 0), (b"\xb2", 0)],
)
def test_how_often_a_message_was_put_back_is_a_number_whatever_its_header_says(value: bytes, times: int) -> None:
    assert times_put_back(b"NATS/1.0\r\nSeamark-Put-Back:" + value + b"\r\n\r\n") == times


def test_a_job_that_another_version_has_put_back_is_taken_for_one_that_others_may_have_begun() -> None:
    """It is there twice if the broker's word about its end was lost, and the claim of the first may have been let go."""
    broker = FakeBroker()
    lane = PulledLane(broker, "push", "normal", lambda: None, lambda unreadable: None)  # type: ignore[arg-type]
    lane._renew()
    for headers in (b"", b"NATS/1.0\r\nSeamark-Put-Back:1\r\n\r\n"):
        lane.order(2)
        broker.bring(broker.orders[-1], headers)
    assert [one.job.again for one in lane.waiting] == [False, True]


@pytest.mark.parametrize(
    "subject", [b"job.push.normal.acme", b"job.push.normal.a=.b", b"job.push.normal.a.topic=3Ax", b"\xff"]
)
def test_what_cannot_be_read_and_belongs_to_nobody_is_set_aside_all_the_same(subject: bytes) -> None:
    unreadable = unreadable_job("push", subject, b"{}")
    assert (unreadable.job.tenant, unreadable.job.user) == ("?", "?")
