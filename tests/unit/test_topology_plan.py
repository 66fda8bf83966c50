"""What is planned for which difference between files and server."""

from dataclasses import replace
from itertools import count

import msgspec
import pytest

from engine.log.marks import Mark, PlacedMark
from engine.topology.diff import changes_between
from engine.topology.files import render
from engine.topology.plan import Observed, decide, remembered_partitions
from tests.support.topology import NOW, stream_with

DAY = 86_400.0


def tags():
    numbers = count()
    return lambda: f"epoch{next(numbers):03}"


def server_with(topology, *, epoch="aaaaaaaa", **stored):
    """A server that agrees with the files; `stored` goes into every stream's state."""
    streams = {}
    for file in topology.streams:
        metadata = (file.config.get("metadata") or {}) | {"seamark.epoch": epoch, "_nats.ver": "2.15.1"}
        streams[file.name] = stream_with(file.config | {"metadata": metadata, "sealed": False}, **stored)
    consumers = {(file.stream, file.name): dict(file.config) for file in topology.consumers}
    epochs = {name: epoch for name in streams if name in ("EVENTS", "BULK", "LATER") or name.startswith("LOG-")}
    planned = {p: PlacedMark(1, Mark(epoch, 0, 1, "owner", epoch)) for p in range(topology.partitions)}
    return Observed(streams, consumers, epochs, planned)


def changed(observed, name, **fields):
    stream = observed.streams[name]
    state = {key: getattr(stream, key) for key in ("messages", "bytes", "first_seq", "last_seq", "oldest_at")}
    observed.streams[name] = stream_with(stream.config | fields, **state)


def test_on_an_empty_server_everything_is_created_and_then_recorded():
    topology = render("dev")
    plan = decide(topology, Observed(), tags())
    actions = [step.action for step in plan.steps]
    created = ["create_stream"] * len(topology.streams) + ["create_consumer"] * len(topology.consumers)
    assert actions == [*created, *["begin_planning"] * 4, "record_epochs"]
    epochs = [step.config["metadata"]["seamark.epoch"] for step in plan.steps if step.action == "create_stream"]
    assert len(set(epochs)) == len(topology.streams)


def test_only_a_log_without_a_mark_in_jobs_gets_one():
    topology = render("dev")
    observed = server_with(topology)
    del observed.planned[2]
    (step,) = decide(topology, observed, tags()).steps
    assert (step.action, step.target) == ("begin_planning", "jmark.2")


def test_jobs_that_are_gone_are_made_anew_without_asking_for_the_stream_holds_no_position_that_could_be_restored():
    topology = render("dev")
    observed = server_with(topology, last_seq=7)
    del observed.streams["JOBS"]
    observed.planned.clear()
    plan = decide(topology, observed, tags())
    assert not plan.refusals
    assert [step.target for step in plan.steps] == ["JOBS", *(f"jmark.{p}" for p in range(4))]


def test_where_files_and_server_agree_nothing_is_planned():
    topology = render("dev")
    plan = decide(topology, server_with(topology), tags())
    assert plan.empty
    assert plan.lines() == ["files and server agree (dev, 4 partitions)"]


def test_a_difference_is_shown_as_it_is_and_as_it_will_be():
    topology = render("dev")
    observed = server_with(topology)
    changed(observed, "LOG-2", max_bytes=1000)
    (step,) = decide(topology, observed, tags()).steps
    assert step.line() == "~ update stream LOG-2: max_bytes 1000 -> 2147483648"


def test_an_update_keeps_the_epoch_and_the_notes_of_others():
    topology = render("dev")
    observed = server_with(topology, epoch="keepme00")
    metadata = observed.streams["LOG-2"].config["metadata"] | {"team": "crm"}
    changed(observed, "LOG-2", max_bytes=1000, metadata=metadata)
    (step,) = decide(topology, observed, tags()).steps
    assert step.config["metadata"] == {"seamark.epoch": "keepme00", "seamark.partitions": "4", "team": "crm"}


def test_a_stream_made_by_hand_is_given_an_epoch():
    topology = render("dev")
    observed = server_with(topology)
    changed(observed, "LOG-1", metadata={"seamark.partitions": "4"})
    (step,) = decide(topology, observed, tags()).steps
    assert (step.action, step.target) == ("update_stream", "LOG-1")
    assert step.config["metadata"]["seamark.epoch"] == "epoch000"


@pytest.mark.parametrize("partitions", [1, 3, 5, 16])
def test_another_number_of_partitions_is_refused_and_nothing_else_is_planned(partitions):
    plan = decide(render("dev", partitions), server_with(render("dev", 4)), tags())
    assert plan.steps == ()
    (refusal,) = plan.refusals
    assert f"made for 4 partitions, {partitions} are asked for" in refusal.detail


def test_the_number_of_partitions_is_remembered_by_whatever_is_left():
    topology = render("dev", 6)
    observed = server_with(topology)
    assert remembered_partitions(observed) == 6
    del observed.streams["EVENTS"]
    assert remembered_partitions(observed) == 6
    assert remembered_partitions(Observed(epochs=observed.epochs)) == 6
    assert remembered_partitions(Observed()) is None


def test_the_transform_tells_the_number_of_a_stream_made_by_hand():
    topology = render("dev", 6)
    events = next(file for file in topology.streams if file.name == "EVENTS")
    bare = {key: value for key, value in events.config.items() if key != "metadata"}
    assert remembered_partitions(Observed({"EVENTS": stream_with(bare)})) == 6


@pytest.mark.parametrize(
    ("stream", "field", "server_value", "said"),
    [
        ("LOG-0", "max_age", 40 * 86400 * 10**9, "drop messages older than"),
        ("LOG-0", "max_age", 0, "drop messages older than"),
        ("LOG-0", "max_bytes", -1, "leave it full at once"),
        ("KV_control", "max_msgs_per_subject", 64, "drop the older messages of every subject"),
        ("LOG-0", "num_replicas", 3, "keep what was accepted with 3 copies on 1"),
        ("EVENTS", "subject_transform", None, "leave stored messages under subjects nobody reads"),
    ],
)
def test_a_change_that_loses_messages_is_refused_by_name(stream, field, server_value, said):
    topology = render("dev")
    month = NOW - 35 * DAY
    observed = server_with(topology, messages=10, bytes=3 << 30, oldest_at=month)
    changed(observed, stream, **{field: server_value})
    plan = decide(topology, observed, tags())
    assert plan.steps == ()
    assert any(refusal.target == stream and said in refusal.detail for refusal in plan.refusals)


def test_a_shorter_age_is_applied_when_nothing_stored_is_that_old():
    topology = render("dev")
    observed = server_with(topology, messages=10, bytes=1000, oldest_at=NOW - DAY)
    changed(observed, "LOG-0", max_age=40 * 86400 * 10**9)
    (step,) = decide(topology, observed, tags()).steps
    assert step.target == "LOG-0"


@pytest.mark.parametrize(("field", "value"), [("storage", "memory"), ("retention", "workqueue"), ("deny_delete", True)])
def test_what_a_server_cannot_change_is_refused_with_the_way_out(field, value):
    topology = render("dev")
    observed = server_with(topology)
    changed(observed, "RECEIPTS", **{field: value})
    plan = decide(topology, observed, tags())
    assert plan.steps == ()
    assert plan.refusals[0].target == "RECEIPTS"
    assert "nats stream backup" in plan.refusals[0].remedy


def test_a_consumer_that_cannot_be_changed_in_place_is_refused_with_the_way_out():
    topology = render("dev")
    observed = server_with(topology)
    observed.consumers["EVENTS", "dispatch-1"]["ack_policy"] = "explicit"
    (refusal,) = decide(topology, observed, tags()).refusals
    assert "nats consumer rm EVENTS dispatch-1" in refusal.remedy


def test_a_recreated_log_keeps_its_old_entry_so_that_dispatchers_refuse_it():
    topology = render("dev")
    observed = server_with(topology)
    del observed.streams["LOG-2"]
    plan = decide(topology, observed, tags(), recreate=True)
    assert [step.action for step in plan.steps] == ["create_stream"], "the recorded epoch must not be replaced"
    assert "it existed once (epoch aaaaaaaa)" in plan.steps[0].line()
    assert any("seamark topology repair" in note for note in plan.notes)


def test_a_stream_that_is_gone_is_not_made_anew_unasked_for_then_no_backup_could_be_restored():
    topology = render("dev")
    observed = server_with(topology)
    del observed.streams["LOG-2"]
    plan = decide(topology, observed, tags())
    assert plan.steps == ()
    (refusal,) = plan.refusals
    assert (refusal.target, "existed once" in refusal.detail) == ("LOG-2", True)
    assert "--recreate" in refusal.remedy
    assert not plan.empty


def test_a_log_that_is_lost_together_with_the_record_of_epochs_is_not_made_anew_unasked():
    topology = render("dev")
    observed = server_with(topology, last_seq=7)
    del observed.streams["LOG-2"]
    (refusal,) = decide(topology, replace(observed, epochs=None), tags()).refusals
    assert refusal.target == "LOG-2"
    # An interrupted first apply has recorded nothing either, but no log holds anything.
    begun = server_with(topology)
    del begun.streams["LOG-2"]
    assert decide(topology, replace(begun, epochs=None), tags()).refusals == ()


def test_streams_and_consumers_of_others_are_left_alone():
    topology = render("dev")
    observed = server_with(topology)
    observed.streams["JOBS-email"] = stream_with({"name": "JOBS-email"})
    observed.consumers["EVENTS", "audit"] = {"name": "audit"}
    assert decide(topology, observed, tags()).empty


def test_a_plan_says_the_same_to_programs_as_to_people():
    topology = render("dev", 1)
    plan = decide(topology, Observed(), tags())
    told = msgspec.to_builtins(plan)
    assert [step["target"] for step in told["steps"]] == [step.target for step in plan.steps]
    assert len(plan.lines()) == len(told["steps"])


@pytest.mark.parametrize(
    ("file", "server"),
    [
        ({"max_msgs": -1}, {"max_msgs": 0}),
        ({}, {"max_msgs": -1, "compression": "none", "consumer_limits": {}, "sealed": False}),
        ({"duplicate_window": 120_000_000_000}, {}),
        ({"max_age": 0}, {}),
        ({}, {"metadata": {"_nats.ver": "2.15.1", "seamark.epoch": "x"}}),
    ],
)
def test_what_a_server_fills_in_is_no_difference(file, server):
    assert list(changes_between("stream", file, server)) == []


def test_a_setting_that_only_the_server_has_is_a_difference():
    (change,) = changes_between("stream", {}, {"max_msgs_per_subject": 5})
    assert str(change) == "max_msgs_per_subject 5 -> -1"
