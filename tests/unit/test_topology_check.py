"""What is found on a server, and how loudly it is said."""

from dataclasses import replace

import msgspec
import pytest

from engine.limits import DUE_SECONDS, JOBS_SUBJECTS_MAX
from engine.log.marks import Mark, PlacedMark
from engine.topology.check import Seen, judge, judge_start
from engine.topology.files import render
from engine.topology.plan import Observed
from tests.support.topology import stream_with

SYNCED = {"version": "2.15.1", "jetstream": {"config": {"sync_always": True}}}
UNSYNCED = {"version": "2.15.1", "jetstream": {"config": {"sync_interval": 120_000_000_000}}}


def seen(profile="production", *, monitors=None, **changes):
    """A server on which everything is as production wants it, but for `changes`."""
    topology = render(profile, 2)
    streams = {}
    for file in topology.streams:
        metadata = (file.config.get("metadata") or {}) | {"seamark.epoch": "epoch000"}
        streams[file.name] = stream_with(
            file.config | {"metadata": metadata}, messages=10, bytes=1000, first_seq=1, last_seq=10
        )
    consumers = {(file.stream, file.name): dict(file.config) for file in topology.consumers}
    epochs = dict.fromkeys(("EVENTS", "BULK", "LATER", "LOG-0", "LOG-1"), "epoch000")
    monitors = {"http://n1:8222": SYNCED} if monitors is None else monitors
    planned = {p: PlacedMark(1, Mark("epoch000", 10, 1, "owner", "epoch000")) for p in range(2)}
    whole = Seen("2.15.1", 2 << 20, monitors, Observed(streams, consumers, epochs, planned))
    return replace(whole, **changes)


def levels(findings):
    return {finding.name: finding.level for finding in findings.findings}


def refusals(findings):
    return [finding.detail for finding in findings.findings if finding.level == "refuse"]


def changed(found, name, **fields):
    stream = found.observed.streams[name]
    state = {key: getattr(stream, key) for key in ("messages", "bytes", "first_seq", "last_seq")}
    return with_stream(found, stream_with(stream.config | fields, **state))


def with_stream(found, stream):
    return replace(found, observed=replace(found.observed, streams=found.observed.streams | {stream.name: stream}))


def test_where_production_is_as_it_must_be_everything_is_said_to_be_so():
    findings = judge(seen(), "production")
    assert not findings.refused
    assert set(levels(findings).values()) == {"ok"}
    assert set(levels(findings)) >= {"version", "max_payload", "sync_always", "files", "replicas"}


@pytest.mark.parametrize(("profile", "level"), [("dev", "warn"), ("production", "refuse")])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("version", {"version": "2.13.9"}),
        ("max_payload", {"max_payload": 1 << 20}),
        ("sync_always", {"monitors": {"http://n1:8222": UNSYNCED}}),
    ],
)
def test_what_dev_is_warned_of_production_refuses(profile, level, name, change):
    findings = judge(seen(profile, **change), profile)
    assert level in {finding.level for finding in findings.findings if finding.name == name}
    assert findings.refused == (level == "refuse")


@pytest.mark.parametrize("profile", ["dev", "production"])
def test_what_cannot_be_found_out_is_called_unknown_and_not_refused(profile):
    for monitors in ({}, {"http://n1:8222": None}):
        findings = judge(seen(profile, monitors=monitors), profile)
        assert levels(findings)["sync_always"] == "unknown"
        assert not findings.refused


def test_one_server_that_does_not_sync_is_enough():
    findings = judge(seen(monitors={"http://n1:8222": SYNCED, "http://n2:8222": UNSYNCED}), "production")
    assert any("http://n2:8222 syncs to disk every 120 s" in detail for detail in refusals(findings))


def test_one_old_server_in_a_cluster_is_enough():
    findings = judge(
        seen(monitors={"http://n1:8222": SYNCED, "http://n2:8222": SYNCED | {"version": "2.11.4"}}), "production"
    )
    assert any("2.11.4" in detail for detail in refusals(findings))


def test_single_copies_are_refused_in_production_and_told_in_dev():
    assert levels(judge(seen("dev"), "dev"))["replicas"] == "warn"
    found = changed(seen(), "LOG-1", num_replicas=1)
    assert "LOG-1 has 1" in next(f.detail for f in judge(found, "production").findings if f.level == "refuse")


def test_a_copy_that_is_away_or_behind_is_named():
    peers = [{"name": "n2", "current": True}, {"name": "n3", "current": False, "offline": True}]
    whole = seen()
    findings = judge(with_stream(whole, replace(whole.observed.streams["LOG-0"], replicas=peers)), "production")
    (finding,) = (f for f in findings.findings if f.name == "replicas")
    assert (finding.level, finding.detail) == ("warn", "copies that are away or behind: LOG-0 on n3")


@pytest.mark.parametrize("days", [7, 3])
def test_a_log_must_outlive_events_or_its_marks_would_be_gone_first(days):
    found = changed(seen(), "LOG-1", max_age=days * 86400 * 10**9)
    findings = judge(found, "production")
    assert levels(findings)["max_age"] == "refuse"


def test_a_log_that_is_kept_for_ever_outlives_everything():
    assert "max_age" not in levels(judge(changed(seen(), "LOG-1", max_age=0), "production"))


@pytest.mark.parametrize("profile", ["dev", "production"])
def test_a_stream_that_is_missing_stops_every_profile(profile):
    found = seen(profile)
    streams = {name: stream for name, stream in found.observed.streams.items() if name != "LOG-1"}
    findings = judge(replace(found, observed=replace(found.observed, streams=streams)), profile)
    assert any(f.level == "refuse" and "missing: LOG-1" in f.detail for f in findings.findings)


@pytest.mark.parametrize("profile", ["dev", "production"])
def test_a_stream_without_epoch_stops_every_profile(profile):
    findings = judge(changed(seen(profile), "LOG-1", metadata={"seamark.partitions": "2"}), profile)
    assert any(f.level == "refuse" and "no epoch" in f.detail for f in findings.findings)


@pytest.mark.parametrize("profile", ["dev", "production"])
def test_another_number_of_partitions_stops_every_profile(profile):
    findings = judge(seen(profile), profile, 4)
    assert any(f.level == "refuse" and "made for 2 partitions, 4 are asked for" in f.detail for f in findings.findings)


def test_a_log_made_for_another_number_is_named():
    metadata = {"seamark.partitions": "8", "seamark.epoch": "epoch000"}
    findings = judge(changed(seen(), "LOG-1", metadata=metadata), "production")
    assert any("LOG-1 was made for 8 partitions, EVENTS for 2" in f.detail for f in findings.findings)


def test_drift_is_a_warning_everywhere():
    findings = judge(changed(seen(), "LOG-1", max_consumers=3), "production")
    assert not findings.refused
    assert levels(findings)["files"] == "warn"


def test_a_stream_that_is_nearly_full_is_named():
    found = seen()
    stream = found.observed.streams["LOG-1"]
    full = replace(stream, bytes=int(stream.config["max_bytes"] * 0.9))
    findings = judge(with_stream(found, full), "dev")
    assert levels(findings)["room"] == "warn"


@pytest.mark.parametrize("name", ["LATER", "JOBS"])
def test_a_stream_above_four_fifths_of_its_watermark_is_named(name: str):
    found = seen()
    stream = found.observed.streams[name]
    assert stream.config["max_bytes"] == -1
    full = replace(stream, bytes=int(int(stream.metadata["seamark.watermark_bytes"]) * 0.9))
    (said,) = [each for each in judge(with_stream(found, full), "dev").findings if each.name == "room"]
    assert said.level == "warn"
    assert f"{name} is 90 % full" in said.detail


def test_too_many_schedules_are_named_before_tenants_get_no_more():
    found = seen()
    full = replace(found.observed.streams["JOBS"], subjects=int(JOBS_SUBJECTS_MAX * 0.85))
    (said,) = [each for each in judge(with_stream(found, full), "dev").findings if each.name == "room"]
    assert (said.level, "850000 schedules" in said.detail) == ("warn", True)


def test_logs_must_outlive_what_was_due():
    kept = int(DUE_SECONDS * 1e9)
    found = changed(changed(changed(seen(), "LOG-1", max_age=kept), "EVENTS", max_age=1), "BULK", max_age=1)
    (said,) = [each for each in judge(found, "production").findings if each.name == "max_age"]
    assert (said.level, "no longer than LATER" in said.detail) == ("refuse", True)


@pytest.mark.parametrize("source", ["EVENTS", "BULK", "LATER"])
def test_events_that_went_back_without_a_restore_are_refused_everywhere(source):
    marks = {(source, 0): PlacedMark(3, Mark("epoch000", 11, 1, "dispatcher", "epoch000"))}
    findings = judge(seen("dev", marks=marks), "dev")
    assert levels(findings)["positions"] == "refuse"
    marks = {("EVENTS", 0): PlacedMark(3, Mark("epoch000", 10, 1, "d", "epoch000"))}
    assert not judge(seen("dev", marks=marks), "dev").refused


@pytest.mark.parametrize(("profile", "names"), [("dev", {"sync_always"}), ("production", {"sync_always", "replicas"})])
def test_a_start_is_told_of_what_its_profile_needs_and_never_refused(profile, names):
    found = changed(seen("dev", monitors={"http://n1:8222": UNSYNCED}), "LOG-1", num_replicas=1)
    told = list(judge_start(found, profile))
    assert {finding.name for finding in told} == names
    assert {finding.level for finding in told} == {"warn"}
    assert list(judge_start(seen("production"), "production")) == []


def test_findings_say_the_same_to_programs_as_to_people():
    findings = judge(seen("dev"), "dev")
    told = msgspec.to_builtins(findings)
    assert len(told["findings"]) == len(findings.lines())
    assert told["refused"] is False
