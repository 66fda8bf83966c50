"""Weekly windows in somebody's own time: quiet hours, send windows, and when digests are due."""

from __future__ import annotations

from typing import Annotated, Literal

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
