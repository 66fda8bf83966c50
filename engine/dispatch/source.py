"""Where dispatchers take events from."""

from __future__ import annotations

from typing import Final, NamedTuple

from engine.log.marks import MarkedStream
from engine.partition.worker import Source
from seamark.protocol.subjects import BULK_STREAM, EVENTS_STREAM, dispatch_consumer, log_stream, mark_subject


class EventSource(NamedTuple):
    """A stream of events.

    Args:
        prefix: the first word of the subjects it stores events under, before the number of the partition.
        mark: what stands before that number in the names of its marks, so that sources tell theirs apart.
        lane: whose pause holds this source up; none: it is never held up.
        urgent: whether it goes before sources that are not.
    """

    stream: str
    prefix: str
    mark: str = ""
    lane: str | None = None
    urgent: bool = True

    def partition(self, number: int) -> Source:
        """What the dispatcher of a partition reads."""
        return Source(self.stream, dispatch_consumer(number), f"{self.prefix}.{number}.>")

    def marked(self, partition: int, event_partition: int) -> MarkedStream:
        """The LOG of a partition as it is written from one of this source's partitions."""
        subject = mark_subject(partition, f"{self.mark}{event_partition}")
        return MarkedStream(self.stream, log_stream(partition), subject)


EVENTS: Final = EventSource(EVENTS_STREAM, "ev")

BULK: Final = EventSource(BULK_STREAM, "bk", "b", lane="bulk", urgent=False)
"""What may wait: events of low priority and pages of campaigns. However much of it waits, EVENTS goes first."""

SOURCES: Final = (EVENTS, BULK)
