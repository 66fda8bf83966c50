"""A provider's limit, kept by all workers together: how many sends a second, and how many of them at once. Pure.

The generic cell rate algorithm (ITU-T I.371, Annex A): one number, the time at which the bucket would be empty of what was taken.
A send takes the next free slot, which may lie a little ahead; who would have to wait longer takes none.

The limit adapts: a 429 halves the pace, and it comes back slowly. What the contract allows is never exceeded.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

PACE_MIN: Final = 1 / 64
"""Of the contract's rate: a provider that refuses everything is still asked now and then."""

REGAIN_PER_SECOND: Final = 1 / 600
"""A pace of one half is whole again after five minutes: FCM counts by the minute, and wants traffic to grow over at least one."""

HALVING_SECONDS: Final = 1.0
"""Refusals of one second halve the pace once: many sends are under way when a limit is met, and all of them are refused."""


class Limit(msgspec.Struct, frozen=True):
    """What a provider's contract allows.

    Args:
        per_second: sends.
        burst: how many of them may come at once. In any time `s` there are at most `per_second * s + burst`.
    """

    per_second: float
    burst: int = 1


class Level(NamedTuple):
    """How full a bucket is. Times are seconds of one clock, the store's.

    Args:
        until: when the bucket is as if nothing had been taken.
        pace: the share of the contract's rate that was granted at `paced_at`.
    """

    until: float = 0.0
    pace: float = 1.0
    paced_at: float = 0.0


class Slot(NamedTuple):
    """What a send was given.

    Args:
        seconds: how long to wait until the slot, or, where there is none, until it is worth asking again.
    """

    level: Level
    taken: bool
    seconds: float


def pace(level: Level, now: float) -> float:
    """The share of the contract's rate that is granted now."""
    return min(1.0, level.pace + max(0.0, now - level.paced_at) * REGAIN_PER_SECOND)


def take(level: Level, limit: Limit, now: float, *, wait_seconds_max: float = 0.0) -> Slot:
    """Take the next slot, if it is not further away than `wait_seconds_max`."""
    gap = 1 / (limit.per_second * pace(level, now))
    until = max(level.until, now)
    seconds = max(0.0, until - (limit.burst - 1) * gap - now)
    if seconds > wait_seconds_max:
        return Slot(level, taken=False, seconds=seconds - wait_seconds_max)
    return Slot(level._replace(until=until + gap), taken=True, seconds=seconds)


def refused(level: Level, now: float) -> Level:
    """The bucket after the provider has said that it was too much."""
    if now - level.paced_at < HALVING_SECONDS and level.pace < 1:
        return level
    return level._replace(pace=max(PACE_MIN, pace(level, now) / 2), paced_at=now)
