"""Where pages end: an audience in byte order, cut so that each page is an event that the broker and the dispatcher take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from seamark.protocol.limits import EVENT_BYTES_MAX, FANOUT_BYTES_MAX, RECIPIENTS_MAX

PAGE_SECONDS: Final = 5
"""A page holds at most what the rate allows in so long: it is the finest grain of a pause, a cancellation, a new rate."""

HEADERS_BYTES: Final = 4096
"""Room in an event for its headers, the boundaries inside, and what `seamark.protocol.events.encode` keeps free."""


class Member(NamedTuple):
    """A user of an audience; `excluded`: who gets nothing."""

    user: str
    excluded: bool


class Window(NamedTuple):
    """A piece of an audience, in byte order.

    Args:
        reached: nobody of the audience up to this user is missing in `members`; "" where there is nobody at all.
        final: nobody comes behind it.
    """

    members: Sequence[Member]
    reached: str
    final: bool


class Bounds(NamedTuple):
    """What a page may hold: recipients, and bytes of their names as JSON."""

    recipients: int
    bytes: int


class Cut(NamedTuple):
    """A page as it would be cut now: the users up to `up_to`, of whom `recipients` get it.

    Args:
        members: all of them, with those who are excluded.
        final: the audience ends here.
    """

    up_to: str
    members: int
    recipients: list[str]
    final: bool

    @property
    def excluded(self) -> int:
        """How many of the users get nothing."""
        return self.members - len(self.recipients)


def bounds(event_bytes: int, data_bytes: int, rate: int | None) -> Bounds:
    """What a page may hold.

    Args:
        event_bytes: of the page's event with nobody in it.
        data_bytes: of the message's data, which each record repeats.
        rate: recipients a second; None: not bounded.
    """
    recipients = min(RECIPIENTS_MAX, FANOUT_BYTES_MAX // max(1, data_bytes))
    if rate is not None:
        recipients = min(recipients, rate * PAGE_SECONDS)
    return Bounds(recipients, EVENT_BYTES_MAX - HEADERS_BYTES - event_bytes)


def cut(window: Window, most: Bounds) -> Cut:
    """The next page: as much of `window` as may stand in one event."""
    recipients: list[str] = []
    left = most.bytes
    for index, (user, excluded) in enumerate(window.members):
        if excluded:
            continue
        size = len(msgspec.json.encode(user)) + 1
        # The first one always fits: a name has at most 128 bytes, an event without names is far below the bound.
        if recipients and (len(recipients) == most.recipients or size > left):
            return Cut(window.members[index - 1].user, index, recipients, final=False)
        recipients.append(user)
        left -= size
    return Cut(window.reached, len(window.members), recipients, window.final)


def remainder(window: Window, piece: Cut) -> Cut:
    """What stands behind `piece` in the same window."""
    left = window.members[piece.members :]
    recipients = [user for user, excluded in left if not excluded]
    return Cut(window.reached, len(left), recipients, window.final)
