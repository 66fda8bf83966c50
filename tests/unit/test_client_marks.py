"""Read marks that the log has not shown yet, against a gateway that stores some of what is said and forgets the rest."""

from __future__ import annotations

import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.session.frames import check_read
from seamark.client.marks import READ_IDS_MAX, Lost, Marks
from seamark.client.receiver import Position


def at(seq: int) -> Position:
    return Position(f"e1.{seq}", seq)


class MarksAndALog(RuleBasedStateMachine):
    """What was marked is either in the log or still kept; nothing is said that a session could not have been sent."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = Marks()
        self.position = at(0)
        self.said: list[str | None] = []
        self.meant_ids: set[str] = set()
        self.meant_up_to = -1
        self.log_ids: set[str] = set()
        self.log_up_to = -1

    @rule(first=st.integers(0, 300), count=st.integers(0, 250))
    def mark_ids(self, first: int, count: int) -> None:
        ids = [f"r{number}" for number in range(first, first + count)]
        self.marks.add(ids)
        self.meant_ids |= set(ids)

    @rule(back=st.integers(0, 5))
    def mark_up_to(self, back: int) -> None:
        seq = max(0, self.position.seq - back)
        self.marks.reach(at(seq))
        self.meant_up_to = max(self.meant_up_to, seq)

    @rule(count=st.integers(1, 9))
    def receive(self, count: int) -> None:
        self.position = at(self.position.seq + count)

    @rule(arrives=st.booleans())
    def say(self, arrives: bool) -> None:
        for frame in self.marks.take(self.position):
            check_read(frame)
            assert len(frame.ids or ()) <= READ_IDS_MAX
            up_to = int(frame.up_to.split(".")[1]) if frame.up_to is not None else None
            assert up_to is None or up_to <= self.position.seq
            self.said.append(frame.id)
            if arrives:
                self._store(frame.ids or [], up_to)
        assert self.marks.take(self.position) == []

    def _store(self, ids: list[str], up_to: int | None) -> None:
        self.log_ids |= set(ids)
        self.log_up_to = max(self.log_up_to, -1 if up_to is None else up_to)
        self.position = at(self.position.seq + 1)
        record = {"kind": "read", "ids": ids} | ({} if up_to is None else {"up_to": up_to})
        self.marks.shown(json.dumps(record).encode())

    @rule()
    def reconnect(self) -> None:
        self.marks.again()

    @rule(back=st.integers(0, 9))
    def be_refused(self, back: int) -> None:
        self.marks.refused(self.said[-1 - back] if back < len(self.said) else None)

    @invariant()
    def what_was_meant_is_in_the_log_or_kept(self) -> None:
        assert self.meant_ids == self.log_ids | self.marks.ids.keys()
        kept = self.marks.up_to.seq if self.marks.up_to is not None else -1
        assert self.meant_up_to == max(self.log_up_to, kept)


TestMarksAndALog = MarksAndALog.TestCase
TestMarksAndALog.settings = settings(max_examples=60, stateful_step_count=25)


def test_only_the_log_makes_a_mark_go_and_what_is_no_record_does_not() -> None:
    marks = Marks()
    marks.add(["a", "b"])
    marks.reach(at(5))
    for record in (b"", b"[]", b"{", b'{"kind":"archive","ids":["a"]}', b'{"kind":"read","ids":5}', b"\xff" * 9):
        marks.shown(record)
    marks.shown(b'{"kind":"read","up_to":4}')
    assert len(marks) == 3
    marks.shown(b'{"kind":"read","ids":["b","x"],"up_to":5}')
    assert list(marks.ids) == ["a"]
    assert marks.up_to is None


def test_a_log_that_was_put_back_gives_its_numbers_to_other_records_so_positions_are_given_up() -> None:
    for reason, kept in (("trimmed", True), ("snapshot", True), ("future", False), ("epoch", False)):
        marks = Marks()
        marks.reach(at(5))
        marks.add(["a", "b"])
        lost = marks.reset(reason, [{"id": "a", "read": True}, {"id": "b", "read": False}])
        assert list(marks.ids) == ["b"]
        assert (marks.up_to is not None) == kept
        assert lost == (None if kept else Lost(up_to="e1.5"))


def test_an_error_concerns_the_marks_of_the_frame_it_names_only() -> None:
    marks = Marks()
    marks.add(["a"])
    first = marks.take(None)[0]
    marks.add(["b"])
    marks.reach(at(5))
    position, second = marks.take(at(9))
    marks.refused(first.id)
    assert [mark.refused for mark in marks.ids.values()] == [True, False]
    for request in (None, second.id):
        assert marks.stale(request) is None
    assert marks.stale(position.id) == Lost(up_to="e1.5")
    assert marks.up_to is None
