"""Which provider is asked next: in their order, leaving out for a while those that did not work. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

from engine.channels.channel import Outcome

REST_SECONDS: Final = 5.0
REST_SECONDS_MAX: Final = 300.0
"""A provider that did not work is left out for so long, doubled each time up to the longest. Then one mail tries it."""

PROBE_SECONDS: Final = 60.0
"""How long that one mail may take before another one may try; longer than any send."""


class _Rest(NamedTuple):
    until: float
    seconds: float


class Rota:
    """Providers by their place in the configuration. Times are of a monotonic clock, in seconds."""

    def __init__(self, count: int) -> None:
        self._rests: dict[int, _Rest] = {}
        self._count = count

    def order(self, now: float) -> list[int]:
        """Whom to ask for one mail, in turn. One whose rest is over stands in its place again.

        If all rest, the one that will be back first is asked all the same: to try is the only way to learn anything, and how
        often is the worker's breaker's matter.
        """
        found = [place for place in range(self._count) if place not in self._rests or self._rests[place].until <= now]
        return found or [min(self._rests, key=lambda place: (self._rests[place].until, place))]

    def asked(self, place: int, now: float) -> None:
        """It is asked now. If it has rested, other mails leave it out until it has worked, or this one is lost."""
        rest = self._rests.get(place)
        if rest is not None:
            self._rests[place] = rest._replace(until=now + PROBE_SECONDS)

    def worked(self, place: int) -> bool:
        """It has answered like one that works. Whether that is news."""
        return self._rests.pop(place, None) is not None

    def failed(self, place: int, now: float) -> bool:
        """It could not send. Whether that is news."""
        before = self._rests.get(place)
        seconds = REST_SECONDS if before is None else min(before.seconds * 2, REST_SECONDS_MAX)
        self._rests[place] = _Rest(now + seconds, seconds)
        return before is None


_HOPE: Final = ("transient", "throttled", "config")
"""What passes by itself; what passes after a time we know; what somebody must mend."""


def together(outcomes: list[Outcome]) -> Outcome:
    """What it comes to when none of the providers could send: the most hopeful of what they say, of equals the first.

    One that is only overloaded is worth waiting for although another is set up wrongly.
    """
    return min(outcomes, key=lambda outcome: _HOPE.index(outcome.kind) if outcome.kind in _HOPE else len(_HOPE))
