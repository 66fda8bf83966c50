"""Read marks that the log has not shown yet, against a gateway that stores some of what is said and forgets the rest."""

from __future__ import annotations

import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from seamark.client.marks import READ_IDS_MAX, Marks
from seamark.protocol.cursor import Cursor


class MarksAndALog(RuleBasedStateMachine):
    """What was marked is either in the log or still kept; nothing is said that a session could not have been sent."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = Marks()
        self.position = Cursor("e1", 0)
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
        self.marks.reach(Cursor("e1", seq))
        self.meant_up_to = max(self.meant_up_to, seq)

    @rule(count=st.integers(1, 9))
    def receive(self, count: int) -> None:
        self.position = Cursor("e1", self.position.seq + count)

    @rule(arrives=st.booleans())
    def say(self, arrives: bool) -> None:
        for frame in self.marks.take(self.position):
            assert frame.keys() <= {"ids", "up_to"}
            assert len(frame.get("ids", ())) <= READ_IDS_MAX
            up_to = int(frame["up_to"].split(".")[1]) if "up_to" in frame else None
            assert up_to is None or up_to <= self.position.seq
            if arrives:
                self._store(frame.get("ids", []), up_to)
        assert self.marks.take(self.position) == []

    def _store(self, ids: list[str], up_to: int | None) -> None:
        self.log_ids |= set(ids)
        self.log_up_to = max(self.log_up_to, -1 if up_to is None else up_to)
        self.position = Cursor("e1", self.position.seq + 1)
        record = {"kind": "read", "ids": ids} | ({} if up_to is None else {"up_to": up_to})
        self.marks.shown(str(self.position), json.dumps(record).encode())

    @rule()
    def reconnect(self) -> None:
        self.marks.again()

    @rule()
    def be_refused(self) -> None:
        self.marks.refused()

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
    marks.reach(Cursor("e1", 5))
    for record in (b"", b"[]", b"{", b'{"kind":"archive","ids":["a"]}', b'{"kind":"read","ids":5}', b"\xff" * 9):
        marks.shown("e1.7", record)
    marks.shown("e2.9", b'{"kind":"read","up_to":9}')
    marks.shown("e1.8", b'{"kind":"read","up_to":4}')
    assert len(marks) == 3
    marks.shown("e1.9", b'{"kind":"read","ids":["b","x"],"up_to":5}')
    assert list(marks.ids) == ["a"]
    assert marks.up_to is None


def test_a_log_that_was_put_back_gives_its_numbers_to_other_records_so_positions_are_given_up() -> None:
    for reason, position, kept in (
        ("trimmed", "e1", True),
        ("snapshot", "e1", True),
        ("future", "e1", False),
        ("epoch", "e2", False),
    ):
        marks = Marks()
        marks.reach(Cursor("e1", 5))
        marks.add(["a", "b"])
        lost = marks.reset(reason, Cursor(position, 2), [{"id": "a", "read": True}, {"id": "b", "read": False}])
        assert list(marks.ids) == ["b"]
        assert (marks.up_to is not None) == kept
        assert (lost is None) == kept
