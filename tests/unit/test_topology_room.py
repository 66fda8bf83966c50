"""When a stream will be full at the rate of late."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from engine.broker.answers import StreamState
from engine.topology.check import judge
from engine.topology.room import Intake, room
from tests.support.topology import stream_with
from tests.unit.test_topology_check import seen

NOW = datetime(2026, 11, 28, tzinfo=UTC)
DAY = 86_400
HOUR = Intake(3600, 3600.0)  # one message a second


def stream(*, messages: int = 1000, max_bytes: int, days: float) -> StreamState:
    """Messages of 100 bytes."""
    config = {"max_bytes": max_bytes, "max_age": round(days * DAY * 1e9)}
    state = {"messages": messages, "bytes": messages * 100, "first_seq": 1, "last_seq": messages}
    return stream_with(config, **state, oldest_at=NOW.timestamp() - DAY, asked_at=NOW.timestamp())


def test_a_stream_whose_age_frees_room_in_time_is_never_full() -> None:
    found = room(stream(max_bytes=100 * 30 * DAY, days=30), HOUR)
    assert found is not None
    assert found.full_at is None
    assert "age frees room" in found.detail()


def test_a_rate_beyond_what_fits_into_the_age_fills_what_is_left() -> None:
    found = room(stream(messages=1000, max_bytes=100 * (1000 + 10 * DAY), days=30), HOUR)
    assert found is not None
    assert found.full_at == NOW + timedelta(days=10)
    assert found.soon
    assert "full on 2026-12-08 00:00 UTC" in found.detail()


def test_a_stream_that_keeps_everything_is_full_one_day_or_another() -> None:
    found = room(stream(messages=0 + 1, max_bytes=100 * (1 + 100 * DAY), days=0), HOUR)
    assert found is not None
    assert found.full_at == NOW + timedelta(days=100)
    assert not found.soon


@pytest.mark.parametrize("intake", [Intake(0, 0.0), Intake(10, 3.0)])
def test_nothing_is_said_of_a_rate_before_there_is_one(intake: Intake) -> None:
    assert room(stream(max_bytes=1 << 30, days=30), intake) is None


def test_a_stream_nobody_writes_to_any_more_does_not_fill() -> None:
    found = room(stream(max_bytes=1 << 30, days=0), Intake(0, 3600.0))
    assert found is not None
    assert found.full_at is None


def test_check_says_of_each_stream_when_it_is_full_and_warns_of_the_one_that_is_soon() -> None:
    whole = seen()
    streams = {
        name: replace(each, asked_at=NOW.timestamp(), bytes=1000) for name, each in whole.observed.streams.items()
    }
    bound = streams["LOG-1"].config["max_bytes"]
    rates = dict.fromkeys(streams, Intake(1, 3600.0)) | {"LOG-1": Intake(3600 * bound // (100 * 5 * DAY), 3600.0)}
    found = judge(replace(whole, observed=replace(whole.observed, streams=streams), intakes=rates), "production")
    rooms = {finding.detail.split()[0]: finding for finding in found.findings if finding.name == "room"}
    assert set(rooms) == {name for name, stream in streams.items() if stream.config.get("max_bytes", -1) > 0}
    assert [name for name, finding in rooms.items() if finding.level == "warn"] == ["LOG-1"]
    assert "full on 2026-12-" in rooms["LOG-1"].detail
