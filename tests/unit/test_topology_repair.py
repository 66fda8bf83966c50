"""Where dispatchers go on after a restore or a loss."""

from dataclasses import replace

import msgspec
import pytest

from engine.dispatch.source import BULK
from engine.errors import TopologyError
from engine.log.marks import NO_MARK, Mark, PlacedMark
from engine.topology import repair_plan
from engine.topology.repair_plan import Found, parse_positions
from tests.support.topology import stream_with

EVENTS, LOGS = "events00", ("log00000", "log11111")


def stream(epoch, *, name="EVENTS", first=1, last=100, restored=None):
    metadata = {"seamark.epoch": epoch} | ({"seamark.restored": restored} if restored else {})
    return stream_with({"name": name, "metadata": metadata}, first_seq=first, last_seq=last, messages=last - first + 1)


def log(p, epoch=None, **facts):
    return stream(epoch or LOGS[p], name=f"LOG-{p}", **facts)


def mark(seq, *, p=0, epoch=EVENTS, log_epoch=None, term=3, user=None):
    return PlacedMark(900 + seq, Mark(epoch, seq, term, "dispatcher", log_epoch or LOGS[p], user))


def found(*, events=None, logs=None, marks=None, recorded=None):
    logs = {p: log(p) for p in range(len(LOGS))} | (logs or {})
    marks = marks if marks is not None else {(0, 0): mark(50), (1, 1): mark(60, p=1)}
    recorded = recorded or {"EVENTS": EVENTS, "LOG-0": LOGS[0], "LOG-1": LOGS[1]}
    return Found(events or stream(EVENTS), logs, marks, recorded, 7)


def decide(found, positions, owner):
    return repair_plan.decide([found], {"EVENTS": positions}, owner)


def after(plan):
    """The marks that are written: how far, and how much of that event."""
    return {at: (one.seq, one.user) for at, one in written(plan).items()}


def written(plan):
    return {step.target: msgspec.convert(step.config, Mark) for step in plan.steps if step.action == "write_mark"}


def epochs(plan):
    return next(step.config for step in plan.steps if step.action == "replace_epochs")


def test_where_everything_fits_there_is_nothing_to_repair():
    plan = decide(found(), {}, "repair")
    assert plan.empty
    assert plan.lines() == ["nothing to repair"]


def test_a_topology_that_was_never_dispatched_needs_no_marks():
    plan = decide(found(marks={}), {}, "repair")
    assert plan.empty


def test_a_log_restored_before_anything_was_dispatched_needs_no_mark():
    logs = {1: log(1, "log1new0", restored=f"{LOGS[1]}.0")}
    plan = decide(found(logs=logs, marks={(0, 0): mark(50)}), {}, "repair")
    assert (plan.refusals, after(plan)) == ((), {})
    assert epochs(plan)["LOG-1"] == "log1new0"


def test_a_restored_log_keeps_the_position_its_own_mark_tells():
    logs = {1: log(1, "log1new0")}
    plan = decide(found(logs=logs), {}, "repair")
    assert after(plan) == {"mark.1.1": (60, None)}
    one = written(plan)["mark.1.1"]
    assert (one.stream_epoch, one.epoch, one.term) == ("log1new0", EVENTS, 4)
    assert epochs(plan)["LOG-1"] == "log1new0"
    assert any("LOG-1" in note and "missing" in note for note in plan.notes)


def test_a_log_that_came_back_empty_wants_a_position_and_hints_at_one():
    logs = {1: log(1, "log1new0")}
    marks = {(0, 0): mark(50), (0, 1): mark(58, p=0)}
    plan = decide(found(logs=logs, marks=marks), {}, "repair")
    (refusal,) = plan.refusals
    assert refusal.target == "partition 1"
    assert "Name first, last or 1=<sequence>" in refusal.remedy
    assert "reach event 58" in refusal.remedy


@pytest.mark.parametrize(("position", "seq"), [("first", 0), ("last", 100), (42, 42)])
def test_a_named_position_is_written(position, seq):
    logs = {1: log(1, "log1new0")}
    plan = decide(found(logs=logs, marks={(0, 0): mark(50)}), {1: position}, "repair")
    assert after(plan) == {"mark.1.1": (seq, None)}


def test_the_home_mark_outdoes_every_foreign_mark_or_its_owner_would_step_down_for_ever():
    logs = {1: log(1, "log1new0")}
    marks = {(0, 0): mark(50), (0, 1): mark(58, p=0, term=57)}
    plan = decide(found(logs=logs, marks=marks), {1: "first"}, "repair")
    assert {at: one.term for at, one in written(plan).items()} == {"mark.1.1": 58}


def test_a_home_mark_that_is_below_its_foreign_marks_is_raised_above_them():
    """As it was found in a LOG that was put back to a backup; where that was said, its dispatcher looks at all marks itself."""
    marks = {(0, 0): mark(50), (1, 1): mark(20, p=1, term=2), (0, 1): mark(58, p=0, term=9)}
    plan = decide(found(marks=marks), {}, "repair")
    assert [(at, one.seq, one.term) for at, one in written(plan).items()] == [("mark.1.1", 20, 10)]


def test_sound_foreign_marks_stay_so_that_what_they_cover_is_not_appended_twice():
    logs = {1: log(1, "log1new0")}
    marks = {(0, 0): mark(50), (1, 1): mark(20, p=1), (0, 1): mark(58, p=0)}
    plan = decide(found(logs=logs, marks=marks), {}, "repair")
    assert "mark.0.1" not in after(plan)


def test_marks_that_dispatchers_can_translate_are_left_to_them():
    events = stream("eventnew", last=70, restored=f"{EVENTS}.55")
    logs = {1: log(1, "log1new0", restored=f"{LOGS[1]}.80")}
    marks = {(0, 0): mark(50, user="bob"), (1, 1): mark(60, p=1, user="bob"), (0, 1): mark(60), (1, 0): mark(49, p=1)}
    plan = decide(found(events=events, logs=logs, marks=marks), {}, "repair")
    assert after(plan) == {}
    assert epochs(plan) == {"EVENTS": "eventnew", "LOG-0": LOGS[0], "LOG-1": "log1new0"}
    assert any("events 56 to 60 were dispatched" in note for note in plan.notes)


def test_a_position_that_is_named_after_a_restore_replaces_the_home_mark_only():
    events = stream("eventnew", last=70, restored=f"{EVENTS}.55")
    marks = {(0, 0): mark(50), (0, 1): mark(60), (1, 1): mark(60, p=1)}
    plan = decide(found(events=events, marks=marks), {1: 52}, "repair")
    assert after(plan) == {"mark.1.1": (52, None)}


def test_a_mark_whose_event_is_younger_than_itself_tells_nothing_and_the_end_of_the_backup_is_asked_for():
    events = stream("eventnew", last=70, restored=f"{EVENTS}.70")
    marks = {(0, 0): mark(40), (1, 1): mark(90, p=1), (0, 1): mark(85)}
    seen = replace(found(events=events, marks=marks), late=frozenset({(1, 1), (0, 1)}))
    plan = decide(seen, {}, "repair")
    (refusal,) = plan.refusals
    assert (refusal.target, "event 70" in refusal.detail) == ("partition 1", True)
    assert "1=<sequence>" in refusal.remedy
    plan = decide(seen, {1: 55}, "repair")
    assert after(plan) == {"mark.0.1": (55, None), "mark.1.1": (55, None)}


@pytest.mark.parametrize("position", ["mark", "first", "last", 42])
def test_events_that_went_back_without_a_restore_are_not_repaired_before_one(position):
    (refusal,) = decide(found(events=stream(EVENTS, last=55)), {None: position}, "repair").refusals
    assert refusal.target == "partition 1"
    assert "seamark topology restore EVENTS=" in refusal.remedy
    assert "--at" not in refusal.remedy


def test_an_event_younger_than_its_mark_is_no_matter_of_clocks_unless_the_operator_says_so():
    seen = replace(found(events=stream(EVENTS, last=100)), late=frozenset({(1, 1)}))
    (refusal,) = decide(seen, {}, "repair").refusals
    assert "seamark topology restore EVENTS=" in refusal.remedy
    named = refusal.remedy.split("--at 1=")[1].rstrip("`")
    plan = decide(seen, {1: int(named)}, "repair")
    assert plan.refusals == ()
    assert after(plan)["mark.1.1"] == (int(named), None)


def test_recreated_events_have_another_numbering_so_positions_must_be_named():
    plan = decide(found(events=stream("eventnew", last=5)), {}, "repair")
    assert {refusal.target for refusal in plan.refusals} == {"partition 0", "partition 1"}


def test_marks_of_a_lost_numbering_are_set_to_the_named_position():
    marks = {(0, 0): mark(50), (1, 1): mark(60, p=1), (0, 1): mark(60)}
    plan = decide(found(events=stream("eventnew", last=5), marks=marks), {None: "first"}, "repair")
    assert after(plan) == {"mark.0.0": (0, None), "mark.0.1": (0, None), "mark.1.1": (0, None)}
    assert epochs(plan)["EVENTS"] == "eventnew"


def test_an_earlier_position_is_told_to_bring_records_twice():
    plan = decide(found(), {0: 40}, "repair")
    assert after(plan) == {"mark.0.0": (40, None)}
    assert any("events 41 to 50 are dispatched again" in note for note in plan.notes)


def test_a_position_beyond_the_last_event_is_refused():
    (refusal,) = decide(found(), {0: 101}, "repair").refusals
    assert "EVENTS ends at 100" in refusal.detail


def test_a_position_for_a_partition_that_does_not_exist_is_refused():
    (refusal,) = decide(found(), {7: 1}, "repair").refusals
    assert refusal.target == "partition 7"


def test_events_that_are_gone_are_told():
    plan = decide(found(events=stream(EVENTS, first=80)), {}, "repair")
    assert any("partition 0: events 51 to 79 are no longer in EVENTS" in note for note in plan.notes)


def test_a_source_that_was_made_anew_is_repaired_by_its_own_positions_and_the_others_are_left_alone():
    marks = {
        (0, 0): mark(30, epoch="bulk0000"),
        (1, 1): mark(20, p=1, epoch="bulk0000"),
        (0, 1): mark(19, epoch="bulk0000"),
    }
    recorded = {"EVENTS": EVENTS, "BULK": "bulk0000", "LOG-0": LOGS[0], "LOG-1": LOGS[1]}
    events = found(recorded=recorded)
    bulk = replace(found(events=stream("bulknew0", name="BULK", last=5), marks=marks, recorded=recorded), source=BULK)
    refused = repair_plan.decide([events, bulk], parse_positions(["first"]), "repair").refusals
    assert [refusal.target for refusal in refused] == ["partition BULK:0", "partition BULK:1"]
    assert "Name BULK:first, BULK:last or BULK:0=<sequence>" in refused[0].remedy
    plan = repair_plan.decide([events, bulk], parse_positions(["BULK:first", "BULK:1=3"]), "repair")
    assert after(plan) == {"mark.0.b0": (0, None), "mark.0.b1": (3, None), "mark.1.b1": (3, None)}
    assert epochs(plan) == recorded | {"BULK": "bulknew0"}


def test_events_that_were_made_anew_have_their_mark_in_later_repaired_too():
    marks = {
        (0, 0): mark(30, epoch="gone0000"),
        ("later", 0): mark(29, epoch="gone0000", log_epoch="later000", term=5),
        (1, 1): mark(60, p=1),
        ("later", 1): mark(55, log_epoch="later000"),
    }
    recorded = {"EVENTS": EVENTS, "LATER": "later000", "LOG-0": LOGS[0], "LOG-1": LOGS[1]}
    events = replace(found(marks=marks, recorded=recorded), later=stream("later000", name="LATER"))
    plan = decide(events, {0: 7}, "repair")
    assert after(plan) == {"mark.later.0": (7, None), "mark.0.0": (7, None)}
    assert written(plan)["mark.later.0"].stream_epoch == "later000"
    assert {one.term for one in written(plan).values()} == {6}


def test_a_source_that_has_never_held_an_event_needs_no_position_in_a_log_that_was_made_anew():
    bulk = replace(
        found(events=stream("bulk0000", name="BULK", first=0, last=0), logs={1: log(1, "log1new0")}, marks={}),
        source=BULK,
    )
    plan = repair_plan.decide([bulk], {}, "repair")
    assert (plan.refusals, after(plan)) == ((), {})


def test_without_epochs_there_is_nothing_to_repair_to():
    bare = stream_with({"name": "LOG-1"})
    (refusal,) = decide(found(logs={1: bare}), {None: "first"}, "repair").refusals
    assert "LOG-1" in refusal.detail
    assert "topology apply" in refusal.remedy


def test_a_plan_says_all_of_it_before_anything_is_done():
    logs = {1: log(1, "log1new0")}
    plan = decide(found(logs=logs, marks={(0, 0): mark(50), (1, 1): NO_MARK}), {1: 42}, "repair")
    lines = plan.lines()
    assert lines[0] == "~ write mark mark.1.1: no mark -> event 42 of EVENTS events00 in stream log1new0, term 1"
    assert lines[1] == "~ replace epochs: LOG-1 log11111 -> log1new0"
    told = msgspec.to_builtins(plan)
    assert told["steps"][0]["config"]["seq"] == 42


@pytest.mark.parametrize(
    ("texts", "positions"),
    [
        ([], {}),
        (["first"], {None: "first"}),
        (["4711"], {None: 4711}),
        (["last", "3=4711", "2=mark"], {None: "last", 3: 4711, 2: "mark"}),
    ],
)
def test_positions_are_read_as_written(texts, positions):
    assert parse_positions(texts) == {"EVENTS": positions, "BULK": {}, "LATER": {}}
    for other in ("BULK", "LATER"):
        named = [f"{other}:{text}" for text in texts]
        assert parse_positions(named) == {"EVENTS": {}, "BULK": {}, "LATER": {}, other: positions}


@pytest.mark.parametrize("texts", [["soon"], ["3=soon"], ["x=1"], ["=1"], ["-1"], ["1=1", "1=2"], ["first", "last"]])
def test_other_texts_are_no_positions(texts):
    with pytest.raises(TopologyError):
        parse_positions(texts)


def test_dead_letters_that_are_still_to_be_stored_are_not_forgotten_by_a_repair():
    def unburied(first: int, at: str) -> int | None:
        left = msgspec.structs.replace(mark(50).mark, unburied=first)
        plan = decide(found(marks={(0, 0): PlacedMark(7, left)}), parse_positions([at])["EVENTS"], "repair")
        return written(plan)["mark.0.0"].unburied

    assert unburied(40, "0=60") == 40
    assert unburied(40, "0=45") == 40
    assert unburied(40, "0=30") is None  # what is dispatched again is buried again
