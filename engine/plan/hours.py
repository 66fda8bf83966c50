"""Weekly windows in somebody's own time: quiet hours, send windows, and when digests are due."""

from __future__ import annotations

import functools
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from operator import itemgetter
from typing import Annotated, Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Clock = Annotated[str, msgspec.Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
"""A time of day, `HH:MM`, on the clock of whoever it is about."""


class Window(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A part of each week: from `start` on the named days until the next time the clock shows `end`.

    An `end` that is not after `start` lies on the following day: 22:00 to 07:00 is a night, 00:00 to 00:00 a whole day.
    """

    start: Clock
    end: Clock
    days: Annotated[tuple[Day, ...], msgspec.Meta(min_length=1, max_length=7)] = DAYS


HORIZON: Final = timedelta(days=8)
"""How far is looked for the end of a silence, or for an hour to send: weekly windows show all they have within a week."""

SPREAD: Final = timedelta(minutes=10)

_ZONE: Final = re.compile(r"[A-Z][A-Za-z0-9_+/-]{0,63}", re.ASCII)
"""Names in the IANA database. The same folder holds others, such as the zone of the machine (`localtime`)."""

Windows = Annotated[tuple[Window, ...], msgspec.Meta(max_length=14)]
"""At most two windows a day: each decision looks at all of them."""


class Digest(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """When notifications that wait for a digest are sent together.

    Args:
        every: the length of the window.
        at: when a day's or a week's window ends, in the user's time.
        day: the day on which a week's window ends.
    """

    every: Literal["hour", "day", "week"] = "day"
    at: Clock = "08:00"
    day: Day = "mon"


def zone_of(*names: str | None) -> tzinfo:
    """The first of `names` that is a time zone of the IANA database; UTC where none is."""
    for name in names:
        if name is not None and (zone := _zone(name)) is not None:
            return zone
    return UTC


def is_zone(name: str) -> bool:
    """Whether `name` is a time zone of the IANA database, as in `Europe/Berlin`."""
    return _zone(name) is not None


@functools.lru_cache(maxsize=1024)  # the names come from users, and looking for one that is none reads the disk
def _zone(name: str) -> tzinfo | None:
    if _ZONE.fullmatch(name) is None:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def moment_of(day: date, clock: str, zone: tzinfo) -> datetime:
    """When the clocks of a zone show a time, by the rules of RFC 5545 (3.3.5).

    A time that exists twice is the first of both. One that is skipped is read by the offset before the gap: 02:30 on the
    night when the clock goes from 02:00 to 03:00 is what it shows as 03:30. Both are what Python calls fold 0.
    """
    return datetime(day.year, day.month, day.day, int(clock[:2]), int(clock[3:]), tzinfo=zone).astimezone(UTC)


def silent_until(windows: tuple[Window, ...], moment: datetime, zone: tzinfo) -> datetime | None:
    """When the window that holds `moment` ends, with all that follow it without a break.

    Returns:
        `moment` itself outside of all windows; None if they go on for `HORIZON`.
    """
    spans = _spans(windows, zone, moment.astimezone(zone).date())
    before = bisect_right(spans, moment, key=itemgetter(0)) - 1
    if before < 0 or spans[before][1] <= moment:
        return moment
    end = spans[before][1]
    return end if end - moment <= HORIZON else None


def open_from(windows: tuple[Window, ...], moment: datetime, zone: tzinfo) -> datetime | None:
    """`moment` if a window holds it, or when the next one begins; None if there is none."""
    spans = _spans(windows, zone, moment.astimezone(zone).date())
    after = bisect_right(spans, moment, key=itemgetter(0))
    if after > 0 and moment < spans[after - 1][1]:
        return moment
    return spans[after][0] if after < len(spans) else None


@functools.lru_cache(maxsize=256)  # of one tenant's users most have the same; a few milliseconds and 50 KB at the worst
def _spans(windows: tuple[Window, ...], zone: tzinfo, today: date) -> list[tuple[datetime, datetime]]:
    """When windows hold that begin around a day, in order; those without a break between them are one.

    From two days before: where a zone left out a day, a night that began before it is still going on after it. Until a fortnight
    after: a change of the clock may leave nothing of the one window in a week.
    """
    spans: list[tuple[datetime, datetime]] = []
    for begin, end in sorted(_occurrences(windows, zone, [today + timedelta(days=offset) for offset in range(-2, 16)])):
        if spans and begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((begin, end))
    return spans


def _occurrences(windows: Sequence[Window], zone: tzinfo, days: Sequence[date]) -> Iterator[tuple[datetime, datetime]]:
    """Begin and end of the windows that begin on these days. One that a change of the clock leaves nothing of has none."""
    for day in days:
        name = DAYS[day.weekday()]
        for window in windows:
            if name in window.days:
                begin = moment_of(day, window.start, zone)
                last = day if window.end > window.start else day + timedelta(days=1)
                end = moment_of(last, window.end, zone)
                if begin < end:
                    yield begin, end


def window_end(digest: Digest, stored_at: datetime, zone: tzinfo) -> datetime:
    """When the window of a digest ends that holds `stored_at`: always after it, and by nothing but the log's stored time."""
    if digest.every == "hour":
        return stored_at.astimezone(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    today = stored_at.astimezone(zone).date()
    days = (today + timedelta(days=offset) for offset in range(-1, 16))
    ends = (
        moment_of(day, digest.at, zone) for day in days if digest.every == "day" or DAYS[day.weekday()] == digest.day
    )
    return next(end for end in ends if end > stored_at)


def spread(tenant: str, user: str) -> timedelta:
    """How much later than others a user's turn is, always the same: 0 to 10 minutes.

    The broker wakes all schedules that are due at once under the lock of their stream. Without this everybody's night would
    end at the same moment.
    """
    place = hashlib.blake2b(f"{tenant}\0{user}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return timedelta(milliseconds=int.from_bytes(place) % (SPREAD // timedelta(milliseconds=1)))
