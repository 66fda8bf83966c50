"""Events that are put off: which, until when, and how they are found again."""

import json
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.broker.answers import WATERMARK_KEY
from engine.broker.jetstream import Outgoing, Stored
from engine.dispatch import clock, due
from engine.dispatch.due import DueWorker
from engine.dispatch.later import (
    EARLY,
    SLOT_TENTHS,
    NotPutOff,
    Page,
    behind,
    moment_of,
    origin_of,
    part_of,
    put_off,
    reached,
    slot_of,
    tenth_of,
    waiting_tenth,
    with_schedules,
)
from engine.dispatch.room import full
from engine.dispatch.rounds import Dead, Planned, Round, due_rounds, plan, plan_due
from engine.dispatch.source import LATER
from engine.limits import BATCH_MESSAGES_MAX, CLAIM_SECONDS, DUE_SECONDS, LATER_SUBJECTS_MAX
from engine.log.marks import Mark
from engine.partition.worker import Delivered
from seamark.protocol.limits import SEND_AHEAD_SECONDS_MAX
from seamark.protocol.subjects import waiting_subject
from tests.support.topology import stream_with

EPOCH = "abcd1234"
STORED_AT = datetime(2026, 11, 29, 12, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
moments = st.integers(-(10**14), 10**15).map(lambda microseconds: STORED_AT + timedelta(microseconds=microseconds))


def delivered(send_at: datetime | None, *, seq: int = 7, to: tuple[str, ...] = ("alice",), **fields: Any) -> Delivered:
    body = {"id": f"e{seq}", "to": list(to), "send_at": send_at and send_at.isoformat(), **fields}
    at = int(STORED_AT.timestamp() * 1e9)
    return Delivered(b"ev.3.default.alice.demo.hello", seq, at, b"", json.dumps(body).encode())


def waiting(send_at: datetime, *, seq: int = 7, at: int = 40, to: tuple[str, ...] = ("alice",)) -> Stored:
    """The event as LATER keeps it under sequence `at`."""
    event = delivered(send_at, seq=seq, to=to)
    planned = plan(event, EPOCH)
    assert isinstance(planned, Planned)
    message = put_off(event, planned.accepted, send_at, (f"{EPOCH}.{seq}", "old.9"), STORED_AT).message("")
    headers = b"NATS/1.0\r\n" + message.headers + b"\r\n"
    return Stored(message.subject, at, STORED_AT.isoformat(), headers, message.payload)


def wake_up(moment: datetime, *, seq: int = 50, woken_at: datetime | None = None) -> Delivered:
    subject = f"due.3.{tenth_of(moment) // SLOT_TENTHS}".encode()
    return Delivered(subject, seq, int((woken_at or moment).timestamp() * 1e9), b"", b"")


@pytest.mark.parametrize(
    ("send_at", "outcome"),
    [
        (None, "now"),
        (STORED_AT - HOUR, "now"),
        (STORED_AT, "now"),
        (STORED_AT + timedelta(microseconds=1), "later"),
        (STORED_AT + timedelta(seconds=SEND_AHEAD_SECONDS_MAX), "later"),
        (STORED_AT + timedelta(seconds=SEND_AHEAD_SECONDS_MAX + 1), "dead"),
    ],
)
def test_an_event_is_put_off_that_was_not_due_when_it_was_stored(send_at: datetime | None, outcome: str) -> None:
    found = plan(delivered(send_at), EPOCH)
    if outcome == "dead":
        assert isinstance(found, Dead)
        assert (found.reason, "30 days" in found.detail) == ("send_at", True)
    else:
        assert isinstance(found, Planned)
        assert (found.later is not None) is (outcome == "later")


@given(moments)
def test_no_event_is_due_before_its_time_nor_a_tenth_of_a_second_after_it(moment: datetime) -> None:
    tenth = tenth_of(moment)
    assert moment <= moment_of(tenth) < moment + timedelta(milliseconds=100)


@given(moments, moments)
def test_what_is_overdue_waits_in_the_present_tenth(send_at: datetime, now: datetime) -> None:
    event = delivered(STORED_AT + HOUR)
    planned = plan(event, EPOCH)
    assert isinstance(planned, Planned)
    found = put_off(event, planned.accepted, send_at, ("e.7",), now)
    assert found.tenth == max(tenth_of(send_at), tenth_of(now))
    ttl = int(found.message("").headers.split(b"Nats-TTL:")[1].split(b"s")[0])
    assert timedelta(seconds=ttl) <= max(send_at, now) - now + timedelta(seconds=DUE_SECONDS, milliseconds=100)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=BATCH_MESSAGES_MAX // 2 - 1))
def test_a_batch_of_events_has_one_schedule_for_each_of_its_slots_and_room_for_its_mark(tenths: list[int]) -> None:
    events = [Outgoing(waiting_subject(3, tenth, "default"), b"") for tenth in tenths]
    found = with_schedules(events)
    schedules = found[len(events) :]
    assert found[: len(events)] == events
    assert {each.subject for each in schedules} == {f"later.3.{tenth // SLOT_TENTHS}" for tenth in tenths}
    assert len({each.subject for each in schedules}) == len(schedules)
    assert len(found) + 1 <= BATCH_MESSAGES_MAX


@pytest.mark.parametrize(
    ("state", "full_of"),
    [
        ({}, None),
        ({"bytes": 99}, None),
        ({"bytes": 100}, "bytes"),
        ({"subjects": LATER_SUBJECTS_MAX}, "different times"),
    ],
)
def test_later_is_full_by_bytes_or_by_how_many_times_are_waited_for(state: dict[str, int], full_of: str | None) -> None:
    said = full(stream_with({"name": "LATER", "metadata": {WATERMARK_KEY: "100"}}, **state))
    assert said is None if full_of is None else full_of in (said or "")


def test_a_schedule_fires_a_quarter_of_a_second_before_its_slot_begins() -> None:
    tenth = tenth_of(STORED_AT)
    (_, schedule) = with_schedules([Outgoing(waiting_subject(3, tenth, "default"), b"")])
    lines = schedule.named_headers
    assert (
        lines["Nats-Schedule"] == f"@at {STORED_AT - EARLY:%Y-%m-%dT%H:%M:%S.%f}Z" == "@at 2026-11-29T11:59:59.750000Z"
    )
    assert lines["Nats-Schedule-Target"] == f"due.3.{tenth // SLOT_TENTHS}"


@given(
    st.tuples(st.integers(0, 4), st.integers(1, 10**18), st.text("Az09_=-", min_size=1)),
    st.tuples(st.integers(0, 4), st.integers(1, 10**18), st.text("Az09_=-", min_size=1)),
)
def test_parts_of_a_slot_sort_by_tenth_event_and_user(one: tuple[int, int, str], two: tuple[int, int, str]) -> None:
    parts = [part_of(tenth, seq) + token for tenth, seq, token in (one, two)]
    assert (parts[0] < parts[1]) is (one < two)
    assert reached(parts[0]) == one[:2]
    assert parts[0] < behind(*one[:2])
    assert (behind(*one[:2]) < parts[1]) is (one[:2] < two[:2])


def test_an_event_that_is_due_becomes_a_record_that_says_where_it_was_and_when_it_was_sent() -> None:
    due = STORED_AT + HOUR
    found = plan_due(waiting(due), wake_up(due))
    assert isinstance(found, Planned)
    record = json.loads(found.template.body("alice"))
    assert record["event"] == {"epoch": EPOCH, "seq": 7}
    assert datetime.fromisoformat(record["at"]) == due
    assert (found.seq, found.claimed) == (50, (f"{EPOCH}.7", "old.9"))
    assert found.part == part_of(tenth_of(due), 40)
    assert (found.accepted.at.partition, found.accepted.at.type) == (3, "demo.hello")


def test_rounds_of_what_is_due_end_behind_their_last_event() -> None:
    due = STORED_AT + HOUR
    page = Page(tenth_of(due), [waiting(due, seq=seq, at=40 + seq) for seq in (1, 2, 3)])
    (found,) = due_rounds(page, wake_up(due), last=False)
    assert [event.accepted.event.id for event in found.planned] == ["e1", "e2", "e3"]
    assert found.end == (50, behind(tenth_of(due), 43))


def test_the_last_round_of_a_wake_up_ends_behind_it() -> None:
    due = STORED_AT + HOUR
    recipients = BATCH_MESSAGES_MAX // 2 + 1
    events = [waiting(due, seq=seq, at=40 + seq, to=tuple(f"u{n}" for n in range(recipients))) for seq in (1, 2)]
    first, second = due_rounds(Page(tenth_of(due), events), wake_up(due), last=True)
    assert (first.end, second.end) == ((50, behind(tenth_of(due), 41)), (50, None))


def test_what_comes_when_its_claim_may_be_gone_is_a_dead_letter() -> None:
    due = STORED_AT + HOUR
    horizon = timedelta(seconds=CLAIM_SECONDS)
    assert isinstance(plan_due(waiting(due), wake_up(due, woken_at=due + horizon)), Planned)
    late = plan_due(waiting(due), wake_up(due, woken_at=due + horizon + timedelta(seconds=1)))
    assert isinstance(late, Dead)
    assert late.reason == "late"


@pytest.mark.parametrize(
    "headers", [b"", b"Seamark-Positions: \r\n", b"Seamark-Positions:abc\r\n", b"Seamark-Positions:\xff.1\r\n"]
)
def test_what_no_dispatcher_has_put_there_is_a_dead_letter(headers: bytes) -> None:
    stored = waiting(STORED_AT + HOUR)._replace(headers=b"NATS/1.0\r\n" + headers + b"\r\n")
    found = plan_due(stored, wake_up(STORED_AT + HOUR))
    assert isinstance(found, Dead)
    assert found.reason == "not_put_off"
    with pytest.raises(NotPutOff):
        origin_of(stored.headers)


@pytest.mark.parametrize("subject", ["wait.3.x.default", "wait.3", "wait.3..a"])
def test_a_subject_that_says_no_time_is_none_of_ours(subject: str) -> None:
    with pytest.raises(NotPutOff):
        waiting_tenth(subject)
    with pytest.raises(NotPutOff):
        slot_of(Delivered(b"due.3.soon", 1, 0, b"", b""))


class Clocks:
    """The broker's clock, and ours, which counts from another moment. Each question takes as long as is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ours: float) -> None:
        self.broker, self.ours, self.asked = STORED_AT.timestamp(), ours, 0
        self.on_the_way = [(0.0, 0.005)]
        monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: self.ours))

    async def stream(self, _name: str) -> Any:
        there, back = self.on_the_way[min(self.asked, len(self.on_the_way) - 1)]
        self.asked += 1
        self.go_on(there)
        state = stream_with({"name": "LATER"}, asked_at=self.broker)
        self.go_on(back)
        return state

    def go_on(self, seconds: float) -> None:
        self.broker += seconds
        self.ours += seconds


@pytest.mark.parametrize("ours", [0.0, 1e6, 2e9])
async def test_events_are_sent_when_it_is_time_by_the_clock_of_the_broker(
    ours: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty slots, each with an event in its last tenth: none is early, and lateness does not add up."""
    clocks, late = Clocks(monkeypatch, ours=ours), []

    async def sleep(seconds: float) -> None:
        clocks.go_on(seconds)

    async def one_page(_broker: Any, _q: int, found: Delivered, _done: str | None) -> AsyncGenerator[Page]:
        yield Page(slot_of(found) * SLOT_TENTHS + SLOT_TENTHS - 1, [])

    async def settle(_worker: DueWorker, _round: Round) -> None:
        clocks.go_on(0.01)

    worker: Any = DueWorker(clocks, None, 0, 4, LATER)  # type: ignore[arg-type]
    worker._writers[0] = SimpleNamespace(mark=Mark(EPOCH, 1, 1, "o", "l"))
    monkeypatch.setattr(due, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(due, "due_by", one_page)
    monkeypatch.setattr(DueWorker, "_settle_round", settle)
    first = tenth_of(STORED_AT) // SLOT_TENTHS + 4
    for slot in range(first, first + 40):
        begins = moment_of(slot * SLOT_TENTHS).timestamp()
        clocks.go_on(max(0.0, begins - EARLY.total_seconds() + 0.005 - clocks.broker))  # it takes 5 ms to arrive
        await worker.handle([wake_up(moment_of(slot * SLOT_TENTHS))])
        late.append(clocks.broker - begins - 0.4)
    assert min(late) > -0.001
    assert max(late) < 0.1
    assert clocks.asked <= 5  # in 20 s


async def test_an_answer_of_the_broker_that_took_long_makes_its_clock_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch, ours=1e6)
    clocks.on_the_way = [(0.001, 0.002), (0.0, 3.0), (3.0, 0.0), (1.0, 1.0)]
    there: Any = clock.BrokerClock(clocks)  # type: ignore[arg-type]
    for _ in range(8):
        assert clocks.broker - 0.005 < await there.now() < clocks.broker + 1e-3
        clocks.go_on(clock.LOOK_SECONDS + 1)
    assert clocks.asked == 8


@pytest.mark.parametrize("step", [-7200.0, -0.5, 0.5, 7200.0])
async def test_a_clock_of_the_broker_that_is_put_right_holds_from_the_next_question(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks(monkeypatch, ours=1e6)
    there: Any = clock.BrokerClock(clocks)  # type: ignore[arg-type]
    await there.now()
    clocks.broker += step
    clocks.go_on(clock.LOOK_SECONDS + 1)
    assert clocks.broker - 0.01 < await there.now() < clocks.broker + 0.01
