"""Marks: whatever happens to batches, answers and owners, every record is in the log once and in order."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.broker.jetstream import WRONG_LAST_SEQUENCE, Outgoing, PubAck, Stored, StreamState
from engine.dispatch import rounds
from engine.dispatch.source import EVENTS
from engine.errors import ApiError, BrokerError, StepDown, Unanswered, Unavailable
from engine.log import writer as logwriter
from engine.log.marks import NO_MARK, Mark, PlacedMark, Verdict, decode_mark, encode_mark, settle
from engine.log.writer import MarkedWriter, Ownership, read_mark

MARKS = st.builds(
    Mark,
    epoch=st.sampled_from(["ev1", "ev2"]),
    seq=st.integers(0, 9),
    term=st.integers(1, 4),
    owner=st.sampled_from(["me", "other"]),
    stream_epoch=st.just("log1"),
    user=st.none() | st.sampled_from(["a", "b", "c"]),
)


def mark(seq: int, user: str | None = None, *, term: int = 2, owner: str = "me") -> Mark:
    return Mark("ev", seq, term, owner, "log", user)


# --- what a mark says ---------------------------------------------------------------------------------------------------


@given(MARKS)
def test_a_mark_survives_its_bytes(one: Mark) -> None:
    assert decode_mark(encode_mark(one)) == one
    assert b"\n" not in encode_mark(one)


def test_bytes_of_marks_that_were_ever_written_are_still_read() -> None:
    old = b'{"epoch":"k3v9x0qa","seq":17,"term":3,"owner":"0a1b","log_epoch":"x9","user":"bob=40example","later":1}'
    assert decode_mark(old) == Mark("k3v9x0qa", 17, 3, "0a1b", "x9", "bob=40example")
    assert decode_mark(b'{"epoch":"e","seq":0,"term":1,"owner":"o","log_epoch":"l"}') == Mark("e", 0, 1, "o", "l")


@given(MARKS, st.integers(0, 10), st.sampled_from(["", "a", "aa", "b", "c", "d"]))
def test_a_mark_covers_what_comes_up_to_it_in_the_order_of_events_and_tokens(one: Mark, seq: int, token: str) -> None:
    assert one.covers(seq, token) == ((seq, token) <= (one.seq, one.user if one.user is not None else "\x7f"))


@given(MARKS)
def test_the_next_event_is_the_first_that_is_not_wholly_covered(one: Mark) -> None:
    assert one.covers(one.next_seq - 1, "\x7f")
    assert not one.covers(one.next_seq, "\x7f")


# --- judging a batch that was not confirmed ------------------------------------------------------------------------------

EXPECTED = PlacedMark(50, mark(5))
SENT = mark(8)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (PlacedMark(60, SENT), Verdict.COMMITTED),
        (EXPECTED, Verdict.SEND_AGAIN),
        (PlacedMark(40, mark(3)), Verdict.ASK_AGAIN),
        (PlacedMark(60, mark(5, owner="other", term=3)), Verdict.STEP_DOWN),
        (PlacedMark(60, mark(5, owner="other", term=2)), Verdict.STEP_DOWN),
        (PlacedMark(60, mark(7, owner="other", term=1)), Verdict.TAKE_OVER),
        (NO_MARK, Verdict.GONE),
    ],
)
def test_each_answer_of_the_leader_has_one_verdict(found: PlacedMark, verdict: Verdict) -> None:
    assert settle(SENT, EXPECTED, found) is verdict


def test_without_a_mark_before_no_mark_means_nothing_was_stored() -> None:
    assert settle(SENT, NO_MARK, NO_MARK) is Verdict.SEND_AGAIN


def test_a_mark_of_mine_that_is_newer_than_the_one_i_expect_is_the_one_to_follow() -> None:
    # After a stale "there is none": what I then expect is less than what I have confirmed before.
    assert settle(SENT, NO_MARK, EXPECTED) is Verdict.FOLLOW


def test_an_equal_mark_that_stood_there_before_confirms_nothing() -> None:
    assert settle(mark(5), EXPECTED, EXPECTED) is Verdict.SEND_AGAIN


# --- owners at work on a simulated log -----------------------------------------------------------------------------------


class SimEntry(NamedTuple):
    """A record as `rounds.batches` sees it."""

    seq: int
    part: str

    def most(self, inside: bool) -> int:
        return rounds.BATCH_MESSAGES_MAX

    def message(self, partition: int) -> Outgoing:
        return Outgoing("log", f"{self.seq}:{self.part}".encode())


PUBLISHED = [
    (),
    ("a",),
    ("a", "b"),
    (),
    ("b",),
    ("a", "b", "c", "d", "e", "f", "g"),
    ("c",),
    ("a",),
    ("a", "c"),
    ("b",),
    (),
]
RECORDS = [f"{seq}:{token}" for seq, tokens in enumerate(PUBLISHED, 1) for token in tokens]


class Call(NamedTuple):
    """A question to the broker that is not answered yet."""

    kind: str
    arguments: Any
    answer: "asyncio.Future[Any]"


class SimStream:
    """LOG-0 as its leader has it: records and the mark, with everything the mark ever was."""

    def __init__(self) -> None:
        self.records: list[str] = []
        self.last_seq = 0
        self.mark: Stored | None = None
        self.marks: list[Stored | None] = [None]

    def commit(self, messages: list[Outgoing]) -> PubAck:
        if expected_by(messages) != (self.mark.seq if self.mark else 0):
            raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence")
        self.records += [message.payload.decode() for message in messages[:-1]]
        self.last_seq += len(messages)
        self.place(Stored(messages[-1].subject, self.last_seq, "", b"", messages[-1].payload))
        return PubAck("LOG-0", self.last_seq)

    def place(self, stored: Stored | None) -> None:
        self.mark = stored
        self.marks.append(stored)


def expected_by(messages: list[Outgoing]) -> int:
    """The sequence of the mark that a batch demands to follow."""
    return int(messages[-1].headers.split(b":")[1])


class SimBroker:
    """What `MarkedWriter` needs of a broker; every question waits until the machine answers it."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls

    async def ask(self, kind: str, arguments: Any = None) -> Any:
        call = Call(kind, arguments, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        return await call.answer

    async def commit(self, messages: list[Outgoing], *, lines: bytes) -> PubAck:
        assert lines == b"Seamark-Epoch:log\r\n"
        return await self.ask("commit", messages)

    async def leader_last(self, stream: str, subject: str) -> Stored | None:
        return await self.ask("leader_last")

    async def stream(self, stream: str) -> StreamState:
        return StreamState(stream, "log", 1, 1, 1 << 40, 0, {})


class Machine(RuleBasedStateMachine):
    """Two dispatchers share one event partition, and the broker answers, lies by lagging, loses and delays."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stream = SimStream()
        self.calls: list[Call] = []
        self.late: list[list[Outgoing]] = []
        self.first_event = 1
        self.names = itertools.count(1)
        self.owners: list[asyncio.Task[None]] = []
        sleep = asyncio.sleep

        async def at_once(seconds: float) -> None:
            await sleep(0)

        self.patches = [
            mock.patch.object(rounds, "BATCH_MESSAGES_MAX", 4),
            mock.patch.object(logwriter.asyncio, "sleep", at_once),
        ]
        for patch in self.patches:
            patch.start()

    @initialize(owners=st.integers(1, 2))
    def start(self, owners: int) -> None:
        for i in range(owners):
            task: Coroutine[Any, Any, None] = self.own(SimBroker(self.calls))
            self.owners.append(self.loop.create_task(task, name=f"owner {i}"))
        self.spin()

    async def own(self, broker: Any) -> None:
        """As `DispatchWorker` does: acquire, then rounds of a few events, until another owner or a doubt ends it."""
        while True:
            try:
                await self.work(broker)
                return
            except StepDown:
                await broker.ask("pin")
            except BrokerError:
                pass

    async def work(self, broker: Any) -> None:
        found, marked = await read_mark(broker, EVENTS.marked(0, 0)), EVENTS.marked(0, 0)
        own = Ownership((found.mark.term if found.mark else 0) + 1, f"owner{next(self.names)}", "ev")
        facts = {"epoch": "log", "found": found, "mark": found.mark, "start_seq": self.first_event - 1}
        writer = await MarkedWriter.take_over(broker, marked, own, **facts)
        seq = writer.mark.next_seq
        while seq <= len(PUBLISHED):
            last = min(seq + 2, len(PUBLISHED))
            entries: Any = [SimEntry(s, t) for s in range(seq, last + 1) for t in PUBLISHED[s - 1]]
            for batch in rounds.batches(rounds.not_covered(entries, writer.mark), 0, last):
                await writer.append(batch.messages, batch.seq, batch.user)
            seq = last + 1

    def spin(self) -> None:
        """Let everyone run until all wait for answers."""
        for _ in range(8):
            self.loop.run_until_complete(asyncio.sleep(0))

    def answer(self, call: Call, outcome: Callable[[], Any]) -> None:
        self.calls.remove(call)
        try:
            call.answer.set_result(outcome())
        except BrokerError as error:
            call.answer.set_exception(error)
        self.spin()

    def pick(self, data: st.DataObject, kind: str) -> Call:
        waiting = [call for call in self.calls if call.kind == kind]
        return waiting[data.draw(st.integers(0, len(waiting) - 1), label=kind)]

    def waits(self, kind: str) -> bool:
        return any(call.kind == kind for call in self.calls)

    @precondition(lambda self: self.waits("commit"))
    @rule(
        data=st.data(), fate=st.sampled_from(["stored", "stored", "no answer", "lost", "late", "unavailable", "busy"])
    )
    def answer_a_batch(self, data: st.DataObject, fate: str) -> None:
        call = self.pick(data, "commit")

        def outcome() -> PubAck:
            if fate == "stored":
                return self.stream.commit(call.arguments)
            if fate == "no answer":
                with contextlib.suppress(ApiError):
                    self.stream.commit(call.arguments)
            if fate == "late":
                self.late.append(call.arguments)
            if fate == "unavailable":
                raise Unavailable
            if fate == "busy":
                raise ApiError(429, 10210, "too many in flight")
            raise Unanswered

        self.answer(call, outcome)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def a_late_batch_arrives(self, data: st.DataObject) -> None:
        messages = self.late.pop(data.draw(st.integers(0, len(self.late) - 1)))
        with contextlib.suppress(ApiError):
            self.stream.commit(messages)

    @precondition(lambda self: self.waits("leader_last"))
    @rule(data=st.data(), fate=st.sampled_from(["fresh", "fresh", "stale", "no answer"]))
    def answer_what_the_mark_is(self, data: st.DataObject, fate: str) -> None:
        call = self.pick(data, "leader_last")
        stale = self.stream.marks[data.draw(st.integers(0, len(self.stream.marks) - 1))] if fate == "stale" else None

        def outcome() -> Stored | None:
            if fate == "no answer":
                raise Unanswered
            return stale if fate == "stale" else self.stream.mark

        self.answer(call, outcome)

    @precondition(lambda self: self.waits("pin"))
    @rule(data=st.data())
    def a_standby_is_pinned(self, data: st.DataObject) -> None:
        self.answer(self.pick(data, "pin"), lambda: None)

    @rule()
    def nothing_happens(self) -> None:
        """There is always a step left, also when all work is done."""

    def is_idle(self) -> bool:
        """Nobody is in doubt about anything: a doubt is settled in seconds, a mark lives for a month."""
        return all(
            call.kind == "pin"
            or (call.kind == "commit" and self.stream.mark and expected_by(call.arguments) == self.stream.mark.seq)
            for call in self.calls
        )

    @precondition(
        lambda self: self.is_idle() and self.stream.mark and decode_mark(self.stream.mark.payload).user is None
    )
    @rule()
    def the_mark_ages_out(self) -> None:
        """Marks outlive events: what was applied before it is gone from EVENTS."""
        assert self.stream.mark is not None
        self.first_event = max(self.first_event, decode_mark(self.stream.mark.payload).seq + 1)
        # A month has gone by: nothing from before is under way any more, and no answer lags that far behind.
        self.stream.marks.clear()
        self.stream.place(None)
        self.late.clear()

    @invariant()
    def every_record_is_there_once_and_in_order(self) -> None:
        assert self.stream.records == RECORDS[: len(self.stream.records)]

    @invariant()
    def nobody_fails(self) -> None:
        for owner in self.owners:
            if owner.done():
                owner.result()

    def teardown(self) -> None:
        try:
            for _ in range(300):
                if not self.calls:
                    break
                call = next((call for call in self.calls if call.kind != "pin"), self.calls[0])
                outcomes: dict[str, Callable[[], Any]] = {
                    "commit": lambda call=call: self.stream.commit(call.arguments),
                    "leader_last": lambda: self.stream.mark,
                    "pin": lambda: None,
                }
                self.answer(call, outcomes[call.kind])
            self.nobody_fails()
            if self.owners:
                assert self.stream.records == RECORDS, "with a broker that answers, the work is not done"
                assert all(owner.done() for owner in self.owners)
        finally:
            for owner in self.owners:
                owner.cancel()
            self.loop.run_until_complete(asyncio.gather(*self.owners, return_exceptions=True))
            self.loop.close()
            for patch in self.patches:
                patch.stop()


TestOwners = Machine.TestCase
TestOwners.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
