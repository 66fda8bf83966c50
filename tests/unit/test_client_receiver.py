"""The receive rules of the client, driven by a model of a correct gateway behind a faulty way."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import example, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from seamark.client.receiver import Advance, Deliver, Drop, Joined, Position, Receiver, Restart, Restore
from seamark.protocol.cursor import Cursor, parse_cursor
from seamark.protocol.frames import LiveFrame, Pong, Ready, RecordFrame, ResetFrame, Skip


def record(seq: int, prev: int, epoch: str = "e1") -> RecordFrame:
    return RecordFrame(seq, prev, f"{epoch}.{seq}", msgspec.Raw(b"{}"))


def skip(seq: int, prev: int, epoch: str = "e1") -> Skip:
    return Skip(seq, prev, f"{epoch}.{seq}")


def at(cursor: str) -> Position:
    """The position of a cursor as this test's gateway writes it."""
    return Position(cursor, int(cursor.partition(".")[2]))


def live(cursor: str) -> LiveFrame:
    return LiveFrame(*at(cursor))


def pong(cursor: str) -> Pong:
    return Pong(*at(cursor))


def reset(reason: str, cursor: str) -> ResetFrame:
    return ResetFrame(reason, *at(cursor), None, [])


def resumed(cursor: str) -> Ready:
    return Ready("s", True, *at(cursor))


def not_resumed(reason: str) -> Ready:
    return Ready("s", reason=reason)


def joined(cursor: str = "e1.5") -> Receiver:
    receiver = Receiver(cursor)
    receiver.connected()
    assert isinstance(receiver.on(resumed(cursor)), Joined)
    return receiver


def test_a_record_whose_prev_is_the_position_held_is_delivered_and_moves_it():
    receiver = joined("e1.5")
    assert isinstance(receiver.on(record(9, 5)), Deliver)
    assert receiver.resume_cursor == "e1.9"


def test_a_record_whose_prev_is_above_the_position_ends_the_session_and_keeps_the_position():
    receiver = joined("e1.5")
    assert isinstance(receiver.on(record(9, 7)), Restart)
    assert receiver.resume_cursor == "e1.5"


def test_a_record_whose_prev_is_below_the_position_is_delivered_as_nothing_lies_between():
    receiver = joined("e1.5")
    assert isinstance(receiver.on(record(9, 2)), Deliver)
    assert isinstance(receiver.on(record(8, 2)), Drop)
    assert receiver.resume_cursor == "e1.9"


def test_what_is_of_a_log_that_was_not_asked_for_is_dropped():
    receiver = joined("e1.5")
    for frame in (record(9, 5), skip(9, 5), reset("epoch", "e2.0")):
        assert isinstance(receiver.on(msgspec.structs.replace(frame, feed="topic:news")), Drop)
    assert receiver.resume_cursor == "e1.5"


def test_a_cursor_is_never_looked_into():
    receiver = Receiver("what an app has stored")
    assert receiver.resume_cursor == "what an app has stored"
    receiver.connected()
    receiver.on(Ready("s", True, "1b00f~zzz", 5))
    assert isinstance(receiver.on(RecordFrame(9, 5, "1b00f~zzy", msgspec.Raw(b"{}"))), Deliver)
    assert receiver.position == Position("1b00f~zzy", 9)


def test_a_record_at_or_below_the_position_is_dropped():
    receiver = joined("e1.5")
    assert isinstance(receiver.on(record(5, 3)), Drop)
    assert isinstance(receiver.on(record(4, 3)), Drop)
    assert receiver.resume_cursor == "e1.5"


def test_live_pong_and_skip_move_the_position():
    receiver = joined("e1.5")
    assert receiver.on(live("e1.20")) == Advance(at("e1.20"), live=True)
    assert receiver.on(pong("e1.30")) == Advance(at("e1.30"))
    assert receiver.on(skip(31, 30)) == Advance(at("e1.31"))
    assert isinstance(receiver.on(record(40, 31)), Deliver)


def test_a_pong_behind_the_position_changes_nothing():
    receiver = joined("e1.5")
    assert isinstance(receiver.on(pong("e1.3")), Drop)
    assert receiver.resume_cursor == "e1.5"


def test_a_reset_is_adopted_whatever_was_held():
    for held, cursor in (("e1.5", "e2.1"), ("e1.5", "e1.900"), ("e1.900", "e1.5")):
        receiver = Receiver(held)
        receiver.connected()
        receiver.on(not_resumed("trimmed"))
        assert isinstance(receiver.on(reset("trimmed", cursor)), Restore)
        assert receiver.resume_cursor == cursor
        epoch, seq = parse_cursor(cursor)
        assert isinstance(receiver.on(record(seq + 2, seq, epoch)), Deliver)


def test_nothing_of_the_log_is_taken_between_ready_and_the_reset_it_announces():
    receiver = Receiver("e1.5")
    receiver.connected()
    receiver.on(not_resumed("epoch"))
    assert isinstance(receiver.on(record(6, 5)), Restart)
    assert receiver.resume_cursor == "e1.5"


def test_a_session_broken_before_its_reset_came_asks_with_the_old_cursor_again():
    receiver = Receiver("e1.5")
    receiver.connected()
    receiver.on(not_resumed("epoch"))
    assert isinstance(receiver.on(pong("e2.7")), Drop)
    receiver.connected()
    assert receiver.resume_cursor == "e1.5"


@pytest.mark.parametrize("frame", [live("e1.4"), resumed("e1.5")])
def test_frames_a_correct_gateway_never_sends_end_the_session(frame):
    assert isinstance(joined("e1.5").on(frame), Restart)


@pytest.mark.parametrize("answer", [resumed("e1.9"), resumed("e1.3"), Ready("s", True)])
def test_resuming_elsewhere_than_asked_is_refused(answer):
    receiver = joined("e1.5")
    receiver.connected()
    assert isinstance(receiver.on(answer), Restart)
    assert receiver.resume_cursor == "e1.5"


def test_a_frame_before_ready_ends_the_session():
    receiver = Receiver("e1.5")
    receiver.connected()
    assert isinstance(receiver.on(record(6, 5)), Restart)


def test_start_is_asked_for_until_a_position_is_held():
    receiver = Receiver("start")
    assert receiver.resume_cursor == "start"
    receiver.connected()
    receiver.on(resumed("e1.0"))
    assert receiver.resume_cursor == "e1.0"


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A log that grows and is re-created, and what an app was given of it."""

    epoch: int = 0
    log: list[int] = field(default_factory=list)
    trimmed: int = 0
    app_epoch: str = ""
    app: list[int] = field(default_factory=list)
    app_from: int = 0
    holes: list[str] = field(default_factory=list)

    @property
    def head(self) -> int:
        return self.log[-1] if self.log else self.trimmed

    def frames(self, cursor: str | None) -> list[object]:
        """What a correct gateway sends on a new session, up to `live`."""
        at = self.trimmed if cursor in (None, "start") else parse_cursor(cursor).seq
        known = cursor in (None, "start") or parse_cursor(cursor).epoch == self.name
        if known and self.trimmed <= at <= self.head and cursor is not None:
            first: list[object] = [resumed(str(Cursor(self.name, at)))]
        else:
            at = self.trimmed
            reason = "new" if cursor is None else "trimmed"
            first = [not_resumed(reason), reset(reason, f"{self.name}.{at}")]
        return first + self.rest(at)

    def rest(self, at: int) -> list[object]:
        """Records behind `at`, every third for another screen, then `live` a little beyond."""
        sent: list[object] = []
        for seq in (one for one in self.log if one > at):
            sent.append((skip if seq % 7 == 0 else record)(seq, at, self.name))
            at = seq
        return [*sent, live(f"{self.name}.{max(at, self.head)}")]

    @property
    def name(self) -> str:
        return f"e{self.epoch}"

    def give(self, outcome: object) -> None:
        """The app's own book-keeping."""
        if isinstance(outcome, Restore):
            self.app_epoch, self.app_from = parse_cursor(outcome.frame.cursor)
            self.app = []
        elif isinstance(outcome, Joined) and outcome.frame.resumed and not self.app_epoch:
            self.app_epoch, self.app_from = parse_cursor(str(outcome.frame.cursor))
        elif isinstance(outcome, Deliver):
            at = parse_cursor(outcome.frame.cursor)
            if at.epoch != self.app_epoch:
                self.holes.append("another epoch without a reset")
            self.app.append(at.seq)


FAULTS = ("keep", "keep", "keep", "keep", "lose", "double", "swap", "cut", "stale")
steps = st.lists(
    st.tuples(
        st.sampled_from(("publish", "publish", "trim", "recreate", "nothing")),
        st.lists(st.sampled_from(FAULTS), max_size=12),
    ),
    max_size=12,
)


def faulty(frames: list[object], faults: list[str], before: list[object]) -> list[object]:
    """`frames` as they might arrive: some lost, doubled, swapped, cut off, or mixed with an older session's of the same log.

    Only a record or skip is lost or overtaken by another: what a `live` or `pong` covers is the gateway's word, and
    nothing in these frames could prove it wrong. A reset may be lost, but no record overtakes it.
    """
    arriving = list(frames)
    for at, fault in enumerate(faults):
        if at >= len(arriving):
            break
        chained = at + 1 < len(arriving) and isinstance(arriving[at + 1], RecordFrame | Skip)
        if fault == "lose" and chained:
            arriving.pop(at)
        elif fault == "double":
            arriving.insert(at, arriving[at])
        elif fault == "swap" and chained and not isinstance(arriving[at], ResetFrame):
            arriving[at], arriving[at + 1] = arriving[at + 1], arriving[at]
        elif fault == "cut":
            del arriving[at:]
        elif fault == "stale" and before:
            arriving.insert(at, before[at % len(before)])
    return arriving


def run(script: list[tuple[str, list[str]]], receiver: Receiver) -> World:
    """Play `script`, then a last undisturbed session, and give what the app has."""
    world, seq, before = World(), 1, []
    for change, faults in [*script, ("nothing", [])]:
        if change == "publish":
            for _ in range(3):
                seq += 1 + seq % 3
                world.log.append(seq)
        elif change == "trim" and len(world.log) > 2:
            world.trimmed, world.log = world.log[1], world.log[2:]
        elif change == "recreate":
            world.epoch, world.log, world.trimmed, seq = world.epoch + 1, [1, 3], 0, 3
        receiver.connected()
        frames = world.frames(receiver.resume_cursor)
        for frame in faulty(frames, faults, before if change != "recreate" else []):
            outcome = receiver.on(frame)
            world.give(outcome)
            if isinstance(outcome, Restart):
                break
        before = [one for one in frames if isinstance(one, RecordFrame | Skip)]
    return world


def verdict(world: World) -> list[str]:
    """What is wrong with what the app got; empty when it is the log from where it began."""
    expected = [seq for seq in world.log if seq > world.app_from and seq % 7]
    wrong = list(world.holes)
    if world.app_epoch != world.name:
        wrong.append("the app is in another epoch at the end")
    kept = [seq for seq in world.app if seq > world.trimmed]
    if kept != expected and kept[-len(expected) :] != expected:
        wrong.append(f"kept {kept}, expected {expected}")
    if world.app != sorted(set(world.app)):
        wrong.append("doubled or reordered")
    return wrong


@settings(max_examples=400, deadline=None)
@given(steps, st.sampled_from([None, "start"]))
@example([("publish", ["keep", "double", "swap", "swap", "swap"])], None)
def test_whatever_the_way_does_the_app_gets_the_log_once_in_order_without_holes(script, cursor):
    assert verdict(run(script, Receiver(cursor))) == []


class NoPrevCheck(Receiver):
    def _on_record(self, frame, held):
        return super()._on_record(msgspec.structs.replace(frame, prev=held.seq), held)


class NoDuplicateDrop(Receiver):
    def _on_record(self, frame, held):
        if frame.seq <= held.seq:
            return Deliver(frame) if isinstance(frame, RecordFrame) else Drop("")
        return super()._on_record(frame, held)


class TakesLogBeforeReset(Receiver):
    def _on_ready(self, frame):
        outcome = super()._on_ready(frame)
        self._anchored = True
        self.position = self.position or Position("e0.0", 0)
        return outcome


class ForgetsToMoveOnSkip(Receiver):
    def _on_record(self, frame, held):
        outcome = super()._on_record(frame, held)
        if isinstance(frame, Skip):
            self.position = held
        return outcome


class ReconnectsFromTheStart(Receiver):
    def connected(self):
        super().connected()
        self.position = None


MUTANTS = [NoPrevCheck, NoDuplicateDrop, TakesLogBeforeReset, ForgetsToMoveOnSkip, ReconnectsFromTheStart]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_catches_a_receiver_without_one_of_the_rules(mutant):
    try:
        find(
            steps,
            lambda script: any(verdict(run(script, mutant(cursor))) for cursor in (None, "start")),
            settings=settings(max_examples=3000, deadline=None, database=None),
        )
    except NoSuchExample:
        pytest.fail(f"{mutant.__name__} went unnoticed")
