"""Windows on somebody's clock, held against that clock itself: what it shows, minute after minute."""

from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan.hours import (
    DAYS,
    SPREAD,
    Digest,
    Window,
    is_zone,
    moment_of,
    open_from,
    silent_until,
    spread,
    window_end,
    zone_of,
)
from tests.support import plans

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


@cache
def changes(zone: str) -> list[datetime]:
    """The minutes in 2025 to 2027 at which the clocks of the zone are changed."""
    clock = ZoneInfo(zone)
    hours = [datetime(2025, 1, 1, tzinfo=UTC) + timedelta(hours=n) for n in range(3 * 8760)]
    found = []
    for before, after in pairwise(hours):
        if clock.utcoffset(before.astimezone(clock)) != clock.utcoffset(after.astimezone(clock)):
            minutes = [before + n * MINUTE for n in range(61)]
            found += [
                b for a, b in pairwise(minutes) if a.astimezone(clock).utcoffset() != b.astimezone(clock).utcoffset()
            ]
    return found


@cache
def shown(zone: str, change: datetime) -> dict[str, datetime]:
    """What the clock shows in the two days around a change, and when it does so first."""
    clock = ZoneInfo(zone)
    found: dict[str, datetime] = {}
    for n in range(-2 * 1440, 2 * 1440):
        moment = change + n * MINUTE
        found.setdefault(moment.astimezone(clock).strftime("%Y-%m-%d %H:%M"), moment)
    return found


def when(zone: str, change: datetime, day: date, clock: str) -> datetime:
    """When the clock shows a time first; if it never does, the time by the offset before the change (RFC 5545)."""
    first = shown(zone, change).get(f"{day} {clock}")
    if first is not None:
        return first
    before = (change - MINUTE).astimezone(ZoneInfo(zone)).utcoffset()
    assert before is not None
    return datetime.fromisoformat(f"{day} {clock}:00+00:00") - before


CHANGES = [(zone, change) for zone in ZONES for change in changes(zone)]


def test_three_zones_change_their_clocks_eighteen_times_in_three_years() -> None:
    assert len(CHANGES) == 18


@pytest.mark.parametrize(("zone", "change"), CHANGES)
def test_every_minute_around_a_change_of_the_clock_is_what_rfc_5545_says(zone: str, change: datetime) -> None:
    clock = ZoneInfo(zone)
    day = change.astimezone(clock).date()
    twice = skipped = 0
    for n in range(5 * 60):
        text = f"{n // 60:02}:{n % 60:02}"
        assert moment_of(day, text, clock) == when(zone, change, day, text)
        skipped += f"{day} {text}" not in shown(zone, change)
        twice += sum((change + k * MINUTE).astimezone(clock).strftime("%H:%M") == text for k in range(-120, 120)) == 2
    assert {skipped, twice} in ({0, 60}, {0, 30}), "there was a change of the clock"


@pytest.mark.parametrize(
    "window",
    [
        Window("22:00", "07:00"),
        Window("02:30", "02:45"),
        Window("01:30", "02:15"),
        Window("02:15", "01:45"),
        Window("00:00", "00:00", ("sun",)),
        Window("01:45", "03:15", ("sun",)),
    ],
    ids=lambda window: f"{window.start}-{window.end}",
)
@pytest.mark.parametrize(("zone", "change"), CHANGES)
def test_a_window_over_a_change_of_the_clock_begins_and_ends_by_the_clock(
    zone: str, change: datetime, window: Window
) -> None:
    clock = ZoneInfo(zone)
    day = change.astimezone(clock).date()
    spans = []
    for offset in (-1, 0, 1):
        begins = day + offset * DAY
        if DAYS[begins.weekday()] in window.days:
            ends = begins if window.end > window.start else begins + DAY
            spans.append((when(zone, change, begins, window.start), when(zone, change, ends, window.end)))
    for n in range(-6 * 60, 6 * 60, 5):
        moment = change + n * MINUTE
        ends = [end for begin, end in spans if begin <= moment < end]
        follow = [begin for begin, end in spans if moment < begin < end]
        assert silent_until((window,), moment, clock) == (_on(spans, max(ends)) if ends else moment)
        opens = open_from((window,), moment, clock)
        assert opens == moment if ends else not follow or opens == min(follow)


def _on(spans: list[tuple[datetime, datetime]], until: datetime) -> datetime:
    """The end of a span and of all that follow it without a break."""
    for begin, end in sorted(spans):
        if begin <= until < end:
            until = end
    return until


def test_new_york_as_the_calendar_has_it() -> None:
    zone = ZoneInfo("America/New_York")
    assert moment_of(date(2026, 3, 8), "02:30", zone) == datetime(2026, 3, 8, 7, 30, tzinfo=UTC), "skipped: 03:30 EDT"
    assert moment_of(date(2026, 11, 1), "01:30", zone) == datetime(2026, 11, 1, 5, 30, tzinfo=UTC), "twice: EDT"


def test_a_night_passes_midnight_and_the_days_are_those_on_which_it_begins() -> None:
    night = (Window("22:00", "07:00", ("fri",)),)
    friday = datetime(2026, 3, 6, tzinfo=UTC)
    ends = friday.replace(day=7, hour=7)
    assert silent_until(night, friday.replace(hour=6), UTC) == friday.replace(hour=6)
    assert silent_until(night, friday.replace(hour=22), UTC) == ends
    assert silent_until(night, friday.replace(day=7, hour=6), UTC) == ends
    assert silent_until(night, ends, UTC) == ends


def test_windows_that_meet_are_one_silence_and_one_without_end_is_said() -> None:
    moment = datetime(2026, 3, 4, 12, tzinfo=UTC)
    meeting = Window("11:00", "13:00"), Window("13:00", "14:00")
    assert silent_until(meeting, moment, UTC) == moment.replace(hour=14)
    assert silent_until((Window("00:00", "00:00"),), moment, UTC) is None


def test_a_night_before_a_day_that_a_zone_left_out_goes_on_after_it() -> None:
    apia = ZoneInfo("Pacific/Apia")  # after the night of 29 December 2011 came the 31st
    night = (Window("22:00", "07:00", ("thu",)),)
    assert silent_until(night, datetime(2011, 12, 30, 10, 30, tzinfo=UTC), apia) > datetime(
        2011, 12, 30, 16, tzinfo=UTC
    )


@settings(max_examples=200, deadline=None)
@given(st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC)), plans.zones)  # noqa: DTZ001
def test_a_digest_window_always_ends_later_and_within_its_length(stored_at: datetime, zone: str) -> None:
    clock = zone_of(zone)
    for digest, length in (
        (Digest("hour"), DAY / 24),
        (Digest("day", "02:30"), DAY),
        (Digest("week", day="sun"), 7 * DAY),
    ):
        end = window_end(digest, stored_at, clock)
        assert stored_at < end <= stored_at + length + timedelta(hours=1), "an hour for a change of the clock"
        assert window_end(digest, end - timedelta(microseconds=1), clock) == end, "all of one window have one end"


def test_users_are_spread_evenly_over_ten_minutes_and_each_stays_in_place() -> None:
    places = [spread("t", f"user-{n}") for n in range(6000)]
    assert places == [spread("t", f"user-{n}") for n in range(6000)]
    minutes = [0] * 10
    for place in places:
        assert timedelta() <= place < SPREAD
        minutes[place // MINUTE] += 1
    assert min(minutes) > 500
    assert spread("t", "a\ud800") != spread("u", "a\ud800")


@pytest.mark.parametrize("name", ["Europe/Berlin", "UTC", "Etc/GMT+3"])
def test_names_of_the_database_are_zones(name: str) -> None:
    assert is_zone(name)


@pytest.mark.parametrize(
    "name", ["", "localtime", "Mars/Phobos", "Europe", "../etc/passwd", "/etc/localtime", "A" * 65, "Ä"]
)
def test_nothing_else_is_a_zone_and_it_counts_as_utc(name: str) -> None:
    assert not is_zone(name)
    assert zone_of(name, None) is UTC
