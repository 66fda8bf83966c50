"""Where dispatchers take events from, and where they put what becomes of them."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from engine.log.marks import MarkedStream
from engine.partition.worker import Source
from seamark.protocol.subjects import (
    BULK_STREAM,
    EVENTS_STREAM,
    LATER_STREAM,
    dispatch_consumer,
    log_stream,
    mark_subject,
)

Place = int | Literal["later"]
"""What a round appends to: the LOG of a partition, or LATER, which keeps events until they are due."""

LATER_PLACE: Final = "later"


def stream_at(place: Place) -> str:
    """The stream of a place."""
    return LATER_STREAM if place == LATER_PLACE else log_stream(place)


class EventSource(NamedTuple):
    """A stream of events.

    Args:
        prefix: the first word of the subjects it stores events under, before the number of the partition.
        mark: what stands before that number in the names of its marks, so that sources tell theirs apart.
        lane: whose pause holds this source up; none: it is never held up.
        urgent: whether it goes before sources that are not.
        due: whether its messages are wake-ups of events that were put off, and not events, which may have to be.
    """

    stream: str
    prefix: str
    mark: str = ""
    lane: str | None = None
    urgent: bool = True
    due: bool = False

    def partition(self, number: int) -> Source:
        """What the dispatcher of a partition reads."""
        own = "*" if self.due else ">"
        return Source(self.stream, dispatch_consumer(number), f"{self.prefix}.{number}.{own}", sparse=self.due)

    def places(self, partitions: int) -> list[Place]:
        """Where its events may end up."""
        return [*range(partitions)] if self.due else [*range(partitions), LATER_PLACE]

    def marked(self, place: Place, event_partition: int) -> MarkedStream:
        """A place as it is written from one of this source's partitions."""
        subject = mark_subject(place, f"{self.mark}{event_partition}")
        # Nothing leaves LATER by age, so a mark has to take the place of the one before.
        return MarkedStream(self.stream, stream_at(place), subject, rollup=place == LATER_PLACE)


EVENTS: Final = EventSource(EVENTS_STREAM, "ev")

BULK: Final = EventSource(BULK_STREAM, "bk", "b", lane="bulk", urgent=False)
"""What may wait: events of low priority and pages of campaigns. However much of it waits, EVENTS goes first."""

LATER: Final = EventSource(LATER_STREAM, "due", "l", urgent=False, due=True)
"""What had a `send_at` and is due now; the other sources put it there. However much is due at once, EVENTS goes first."""

SOURCES: Final = (EVENTS, BULK, LATER)
