"""What a position of an earlier incarnation means in the present one, by the lineage that streams remember."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.broker.answers import StreamState
from engine.errors import PartitionStopped
from engine.log.incarnations import continues, inherited, renumbered, restored_metadata, translated
from engine.log.marks import NO_MARK, Mark, PlacedMark
from tests.support.topology import stream_with

EVENTS, LOG = "events00", "log00000"


def stream(epoch: str, *, name: str = "EVENTS", last: int = 100, restored: str = "") -> StreamState:
    metadata = {"seamark.epoch": epoch} | ({"seamark.restored": restored} if restored else {})
    return stream_with({"name": name, "metadata": metadata}, first_seq=1, last_seq=last, messages=last)


def mark(
    seq: int, *, epoch: str = EVENTS, log_epoch: str = LOG, user: str | None = None, unburied: int | None = None
) -> Mark:
    return Mark(epoch, seq, 3, "dispatcher", log_epoch, user, unburied)


def read(
    found: Mark | None, *, events: StreamState | None = None, log: StreamState | None = None, recorded: str = LOG
) -> Mark | None:
    placed = NO_MARK if found is None else PlacedMark(900, found)
    log = log or stream(LOG, name="LOG-0")
    return translated(placed, 0, events or stream(EVENTS), log, {"LOG-0": recorded})


def test_where_both_streams_are_the_ones_it_was_written_for_a_mark_says_what_it_said() -> None:
    assert read(mark(50, user="bob", unburied=40)) == mark(50, user="bob", unburied=40)


@pytest.mark.parametrize(
    ("found", "means"),
    [
        (mark(50, user="bob"), mark(50, epoch="eventnew", user="bob")),
        (mark(55, user="bob"), mark(55, epoch="eventnew", user="bob")),
        (mark(60, user="bob"), mark(55, epoch="eventnew")),
        (mark(60, unburied=40), mark(55, epoch="eventnew", unburied=40)),
        (mark(60, unburied=58), mark(55, epoch="eventnew")),
    ],
)
def test_restored_events_keep_their_numbers_up_to_the_end_of_the_backup(found: Mark, means: Mark) -> None:
    assert read(found, events=stream("eventnew", last=70, restored=f"{EVENTS}.55")) == means


def test_numbers_hold_through_several_restores_up_to_the_shortest_backup() -> None:
    events = stream("eventnew", last=90, restored=f"middle00.70 {EVENTS}.80")
    assert inherited(events) == {"middle00": 70, EVENTS: 70}
    assert read(mark(75), events=events) == mark(70, epoch="eventnew")
    assert read(mark(60, epoch="middle00"), events=events) == mark(60, epoch="eventnew")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=20), st.integers(0, 60))
def test_a_position_means_the_same_messages_through_any_number_of_restores(
    restores: list[tuple[int, int]], seq: int
) -> None:
    """A stream as a list of messages, put back and grown again and again: what a position covered is covered still."""
    state, messages, number = stream("e0", last=60), [f"0.{n}" for n in range(60)], 0
    covered, held = set(messages[:seq]), len(restores) <= 16
    for number, (end, grown) in enumerate(restores, 1):
        metadata = restored_metadata(state, f"e{number}", end)
        messages = messages[:end] + [f"{number}.{n}" for n in range(grown)]
        state = stream_with({"name": "EVENTS", "metadata": metadata}, last_seq=len(messages), messages=len(messages))
    meant = renumbered(mark(seq, epoch="e0"), state)
    assert (meant is not None) == held
    if meant is not None:
        assert set(messages[: meant.seq]) == covered & set(messages)


def test_a_restored_log_keeps_the_position_its_own_mark_tells() -> None:
    assert read(mark(50), log=stream("lognew00", name="LOG-0", restored=f"{LOG}.7")) == mark(50)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"found": mark(3), "events": stream("eventnew")}, "not the present one"),
        ({"found": mark(3), "log": stream("lognew00", name="LOG-0")}, "another incarnation than its mark says"),
        ({"found": None, "log": stream("lognew00", name="LOG-0")}, "re-created and holds no mark"),
    ],
)
def test_what_no_lineage_tells_is_for_an_operator_to_say(what: dict, why: str) -> None:
    with pytest.raises(PartitionStopped, match=why) as stopped:
        read(**what)
    assert "seamark topology repair" in stopped.value.remedy


def test_a_mark_beyond_the_end_of_events_names_the_restore_that_nobody_has_said() -> None:
    for found, events in (
        (mark(60), stream(EVENTS, last=55)),
        (mark(60), stream("new", last=50, restored=f"{EVENTS}.55")),
    ):
        with pytest.raises(PartitionStopped) as stopped:
            read(found, events=events)
        assert "seamark topology restore EVENTS=" in stopped.value.remedy


def test_no_mark_is_the_beginning_where_the_log_is_the_recorded_one_or_its_backup() -> None:
    assert read(None) is None
    assert read(None, log=stream("lognew00", name="LOG-0", restored=f"{LOG}.0")) is None


def test_a_restore_adds_to_the_lineage_and_keeps_other_notes() -> None:
    metadata = restored_metadata(stream("second00", last=80, restored="first000.50"), "third000")
    assert metadata == {"seamark.epoch": "third000", "seamark.restored": "second00.80 first000.50"}
    assert restored_metadata(stream("first000", last=80), "second00", 60)["seamark.restored"] == "first000.60"
    assert continues(stream("third000", restored="second00.80 first000.50"), "first000")
    assert not continues(stream("third000", restored="second00.80"), "first000")
