"""Tells live sessions their user's unread count: absolute, and not more often than a person can see."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, Protocol

import structlog

from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from projections import metrics
from projections.unread.store import Counted
from seamark.protocol.frames import Unread, unread_frame

_log = structlog.get_logger("seamark.unread")

SPACING_SECONDS: Final = 0.25
"""A user's first change is told at once, what follows within this time in one frame at its end."""

CATEGORIES_MAX: Final = 50
"""Categories of one frame, those with most unread: names are free text, and a frame goes to every device."""


class Countable(Protocol):
    """Anything that says how many are unread."""

    @property
    def count(self) -> int: ...
    @property
    def by_category(self) -> dict[str, int]: ...
    @property
    def more(self) -> bool: ...


def count_for_clients(unread: Countable, as_of: int, *, stale: bool = False) -> Unread:
    """The count as clients get it: of many categories only those with the most unread."""
    categories = unread.by_category
    if len(categories) > CATEGORIES_MAX:
        categories = dict(sorted(categories.items(), key=lambda item: (-item[1], item[0]))[:CATEGORIES_MAX])
    return Unread(unread.count, as_of, unread.more, categories, stale)


class UnreadFrames:
    """Publishes counts of one partition on the users' live subjects.

    They are not stored: a session that misses one is told the count when it joins, and when the gateway compares.
    """

    def __init__(self, broker: Broker, partition: int) -> None:
        self._broker = broker
        self._prefix = b"live.%d." % partition
        self._recent: set[str] = set()
        self._later: dict[str, bytes] = {}
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, counts: Iterable[Counted], as_of: int) -> None:
        """Tell these users' sessions; those told within the last quarter of a second are told again at its end."""
        for user, unread in counts:
            frame = unread_frame(count_for_clients(unread, as_of))
            if user in self._recent:
                self._later[user] = frame
            else:
                self._recent.add(user)
                self._publish(user, frame)
        if self._recent and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SPACING_SECONDS, self._end_of_spacing)

    def _end_of_spacing(self) -> None:
        later, self._later, self._timer = self._later, {}, None
        self._recent = set(later)
        for user, frame in later.items():
            self._publish(user, frame)
        if later:
            self._timer = asyncio.get_running_loop().call_later(SPACING_SECONDS, self._end_of_spacing)

    def _publish(self, user: str, frame: bytes) -> None:
        try:
            self._broker.publish(self._prefix + user.encode(), frame)
        except BrokerError as error:
            metrics.unread_frames.labels("lost").inc()
            _log.debug("unread_count_not_told", error=type(error).__name__)
        else:
            metrics.unread_frames.labels("sent").inc()

    def close(self) -> None:
        """Tell what waits, and stop."""
        if self._timer is not None:
            self._timer.cancel()
            self._end_of_spacing()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
