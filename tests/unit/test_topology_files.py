"""The files in `nats/` and their rendering."""

import json
import re
from pathlib import Path

import pytest

from engine.broker.answers import WATERMARK_KEY
from engine.dispatch.source import SOURCES
from engine.errors import TopologyError
from engine.jobs.messages import LANES, job_consumer
from engine.jobs.queue import ACK_WAIT_SECONDS
from engine.jobs.worker import AHEAD
from engine.limits import DUE_SECONDS, PIN_TIMEOUT_SECONDS, PULL_BATCH
from engine.plan.rules import CHANNELS
from engine.topology.files import PARTITIONS_DEFAULT, PROFILES, files_folder, render
from seamark.protocol.limits import EVENT_BYTES_MAX
from seamark.protocol.subjects import JOBS_STREAM
from tests.support.topology import Overrides

DIFFERENT_BY_PROFILE = {"num_replicas", "max_bytes"}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_partition_has_a_log_a_dispatch_consumer_and_one_for_each_projection(profile):
    topology = render(profile)
    numbers = range(PARTITIONS_DEFAULT[profile])
    streams = {stream.name for stream in topology.streams}
    fixed = {"EVENTS", "BULK", "LATER", "RECEIPTS", "JOBS", "DEAD-LETTERS", "KV_control", "KV_cancels", "KV_signouts"}
    assert streams == {*fixed, *(f"LOG-{p}" for p in numbers)}
    assert {(consumer.stream, consumer.name) for consumer in topology.consumers} == {
        *((source, f"dispatch-{q}") for source in ("EVENTS", "BULK", "LATER") for q in numbers),
        *((f"LOG-{p}", f"{name}-{p}") for p in numbers for name in ("unread", "inbox", "plan")),
        *(("RECEIPTS", f"deliveries-{p}") for p in numbers),
        *(("JOBS", job_consumer(channel, lane)) for channel in CHANNELS if channel != "inapp" for lane in LANES),
    }
    filters = {consumer.name: consumer.config["filter_subject"] for consumer in topology.consumers}
    assert {filters[name] for name in ("unread-1", "inbox-1", "plan-1")} == {">"}
    assert filters["deliveries-1"] == "rcpt.1.>"


@pytest.mark.parametrize("profile", PROFILES)
def test_rendering_leaves_no_mark_of_ours_behind(profile):
    topology = render(profile, 7)
    for file in (*topology.streams, *topology.consumers):
        assert "${" not in file.text
        assert file.config == json.loads(file.text)


def test_the_number_of_partitions_reaches_the_transform_and_the_metadata():
    topology = render("dev", 7)
    events = next(stream for stream in topology.streams if stream.name == "EVENTS")
    assert events.config["subject_transform"]["dest"].startswith("ev.{{partition(7,1,2)}}.")
    told = {
        stream.name
        for stream in topology.streams
        if (stream.config.get("metadata") or {}).get("seamark.partitions") == "7"
    }
    assert told == {"EVENTS", "BULK", "LATER", *(f"LOG-{p}" for p in range(7))}


def test_profiles_differ_in_size_and_copies_only():
    dev, production = render("dev", 2), render("production", 2)
    for small, large in zip((*dev.streams, *dev.consumers), (*production.streams, *production.consumers), strict=True):
        for config in (small.config, large.config):
            (config.get("metadata") or {}).pop(WATERMARK_KEY, None)  # the size of a stream that has no `max_bytes`
        differing = {key for key in small.config | large.config if small.config.get(key) != large.config.get(key)}
        assert differing <= DIFFERENT_BY_PROFILE, small.name
        assert (small.config["num_replicas"], large.config["num_replicas"]) == (1, 3)


@pytest.mark.parametrize("profile", PROFILES)
def test_no_stream_drops_what_it_has_accepted_before_its_time(profile):
    for stream in render(profile).streams:
        assert stream.config["storage"] == "file"
        if stream.config.get("allow_msg_schedules"):
            # The server refuses schedules together with `discard: new`, so nothing may ever make it discard.
            assert stream.config["discard"] == "old"
            bounds = {
                name: stream.config[name] for name in ("max_bytes", "max_msgs", "max_msgs_per_subject", "max_age")
            }
            assert bounds == {"max_bytes": -1, "max_msgs": -1, "max_msgs_per_subject": -1, "max_age": 0}
            continue
        assert stream.config["discard"] == "new"
        assert stream.config["max_bytes"] > 0, "a stream without bound fills the disk and stops all others"
        assert stream.config["max_consumers"] > 0, "-1 means 1000 since 2.15"
        if not stream.name.startswith("KV_"):
            assert stream.config["max_msgs_per_subject"] == -1


@pytest.mark.parametrize("profile", PROFILES)
def test_logs_outlive_events_and_hold_whatever_an_event_may_become(profile):
    streams = {stream.name: stream.config for stream in render(profile).streams}
    for source in SOURCES:
        # LATER keeps whole events, with headers of its own.
        assert streams[source.stream]["max_msg_size"] == EVENT_BYTES_MAX * (2 if source.due else 1)
    for name, config in streams.items():
        if name.startswith("LOG-"):
            assert config["max_age"] > max(streams[source.stream]["max_age"] for source in SOURCES)
            assert config["max_age"] > DUE_SECONDS * 1e9
            assert config["max_msg_size"] > EVENT_BYTES_MAX


@pytest.mark.parametrize("profile", PROFILES)
def test_consumers_agree_with_the_limits_in_code(profile):
    for consumer in render(profile).consumers:
        if consumer.stream == JOBS_STREAM:
            assert consumer.config["ack_wait"] == ACK_WAIT_SECONDS * 1e9
            assert consumer.config["max_batch"] >= AHEAD
            continue
        assert consumer.config["priority_timeout"] == PIN_TIMEOUT_SECONDS * 1e9
        assert consumer.config["max_batch"] >= PULL_BATCH


def test_overrides_change_what_they_name_and_nothing_else():
    plain = render("production", 2)
    small = render(
        "production", 2, overrides=Overrides(replicas=1, pin_timeout_seconds=1, stream_bytes={"LOG": 1 << 20})
    )
    for before, after in zip(plain.streams, small.streams, strict=True):
        expected = (
            before.config | {"num_replicas": 1} | ({"max_bytes": 1 << 20} if before.name.startswith("LOG-") else {})
        )
        assert after.config == expected == json.loads(after.text)
    for before, after in zip(plain.consumers, small.consumers, strict=True):
        pins = {"priority_timeout": 1_000_000_000} if "priority_timeout" in before.config else {}
        assert after.config == before.config | {"num_replicas": 1} | pins


def test_rendered_files_are_written_under_names_that_say_what_they_are(tmp_path: Path):
    paths = render("dev", 2).write(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in paths}
    assert {"streams/EVENTS.dev.json", "streams/LOG-1.dev.json", "consumers/EVENTS.dispatch-1.dev.json"} <= names
    assert all(json.loads(path.read_text()) for path in paths)


@pytest.mark.parametrize("partitions", [0, -1, 65])
def test_an_impossible_number_of_partitions_is_refused(partitions):
    with pytest.raises(TopologyError, match="1 to 64"):
        render("dev", partitions)


def test_an_unknown_profile_is_refused_by_name():
    with pytest.raises(TopologyError, match="staging"):
        render("staging")  # type: ignore[arg-type]


def test_a_broken_file_is_named(tmp_path: Path):
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "EVENTS.dev.json").write_text("{")
    with pytest.raises(TopologyError, match=r"EVENTS\.dev\.json is not JSON"):
        render("dev", folder=tmp_path)


def test_a_folder_without_files_is_named_with_the_way_out(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SEAMARK_NATS_FILES", str(tmp_path / "nowhere"))
    with pytest.raises(TopologyError, match="Set SEAMARK_NATS_FILES"):
        files_folder()


def test_accounts_name_every_log_of_production():
    text = (files_folder() / "accounts.conf").read_text()
    for method in ("DIRECT.GET", "STREAM.MSG.GET", "STREAM.INFO", "STREAM.PURGE"):
        named = {int(number) for number in re.findall(rf'"\$JS\.API\.{re.escape(method)}\.LOG-(\d+)"', text)}
        assert named == set(range(PARTITIONS_DEFAULT["production"])), method


def test_accounts_let_nobody_delete_a_stream_and_only_the_projector_purge_what_is_a_users():
    """Single messages are deleted of dead letters only: those that a gateway has replayed or dropped."""
    text = re.sub(r"deny: \[.*?\]", "", (files_folder() / "accounts.conf").read_text(), flags=re.DOTALL)
    assert not re.search(r"STREAM\.(DELETE|MSG\.DELETE\.(?!DEAD-LETTERS\b))|\$JS\.API\.>|\$JS\.API\.STREAM\.[>*]", text)
    purges = {
        user.partition(",")[0]: set(re.findall(r'"\$JS\.API\.STREAM\.PURGE\.([^"]+)"', user))
        for user in text.split("user: ")[1:]
    }
    logs = {f"LOG-{p}" for p in range(PARTITIONS_DEFAULT["production"])}
    assert {user: streams for user, streams in purges.items() if streams} == {
        "projector": logs | {"RECEIPTS", "DEAD-LETTERS"}
    }
