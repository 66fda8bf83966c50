"""The nouns of the join of history and live: what a `Feed` asks its owner for, and in which words.

`gateway.join.feed` decides, the owner of a feed (a session) acts. This module holds the seam between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from seamark.protocol.cursor import Cursor
from seamark.protocol.frames import Unread


class State(Enum):
    """Where a feed stands."""

    OPEN = "open"  # said hello, no position accepted yet
    CATCH = "catching up"  # reads the log, or waits for room to go on reading
    LIVE = "live"  # has shown everything it has heard of; live copies go straight out
    RESET = "reset"  # waits for the snapshot that replaces its position
    CLOSED = "closed"  # ignores everything


class ResetReason(Enum):
    """Why a position was given up. The values are those of the `reason` member on the wire."""

    NEW = "new"  # the device brought no cursor
    SNAPSHOT = "snapshot"  # the device has lost what it showed, and asked for a snapshot
    EPOCH = "epoch"  # the cursor belongs to another incarnation of the log
    FUTURE = "future"  # the cursor lies beyond the end of the log: the log has gone back
    TRIMMED = "trimmed"  # age has removed what would come next


class Ask(Enum):
    """What a feed wants to know: named in requests, in their failure and in timers."""

    OPENING = "opening"  # head by any replica; the watch's last answer is its floor
    CHECK = "check"  # head by any replica; the floor is asked from the leader after the request
    LEADER = "leader"  # state and head, both by the leader
    PAGE = "page"  # records by any replica
    NEXT = "next"  # one record by the leader
    STATE = "state"  # state by the leader


class LogState(NamedTuple):
    """What the leader says of the stream that holds the log: the answer of the watch."""

    epoch: str
    first_seq: int
    last_seq: int

    @property
    def floor(self) -> int:
        """The lowest position from which nothing is missing; a stream that never held a message says `first_seq` 0."""
        return max(self.first_seq - 1, 0)

    def is_old(self, seq: int) -> bool:
        """Whether trimming may get as far as `seq` before the watch has its next answer."""
        return 2 * seq < self.first_seq + self.last_seq


class Message(Protocol):
    """A record as the owner holds it. The feed looks at nothing but its sequence, and only in pages."""

    @property
    def seq(self) -> int:
        """Stream sequence of the record."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The projections of a user at one moment: what a device shows in place of history it cannot have.

    `checkpoint` is the position the rows are true at, read in the same statement as the rows; None when nothing could
    be read. `inbox` holds JSON objects, encoded or not. `stale` is said when rows or count may be older than the
    checkpoint claims.
    """

    checkpoint: Cursor | None
    inbox: Sequence[Any] = ()
    unread: Unread | None = None
    stale: bool = False


@dataclass(slots=True)
class FeedCounters:
    """What the feeds of a process have met; one object is shared by all of them."""

    repairs: int = 0  # a live copy showed that an earlier one was lost
    missed: int = 0  # a heads check found a record that no live copy had shown
    stale_heads: int = 0  # a replica's head lay behind what was known when it was asked
    fruitless_reads: int = 0  # a read ended before what had been heard of
    leader_reads: int = 0  # a record was read from the leader as no replica showed it
    gone: int = 0  # what was heard of had been erased before it could be read
    overflows: int = 0  # a cache of parked records was dropped
    no_room: int = 0  # a record found no room in its socket
    failures: int = 0  # a question stayed without an answer
    resets: dict[ResetReason, int] = field(default_factory=lambda: dict.fromkeys(ResetReason, 0))


class Port(Protocol):
    """What a feed asks of its owner.

    Every call returns at once; from inside it nothing of the feed is called but `close`. Every `want_…` is followed by
    exactly one answer or one `Feed.failed` with the same generation, within a bounded time.
    """

    def room(self) -> bool:
        """Whether another record may be written. After a no, the owner calls `Feed.writable` once there is room."""
        ...

    def deliver(self, seq: int, message: Message) -> bool:
        """Write `message` as a frame `record` or `skip` with the cursor `<epoch>.<seq>`, or refuse it.

        True: the frame is accepted and is never taken back. False: there is no room and nothing was written; the owner
        calls `Feed.writable` once there is room.
        """
        ...

    def resumed(self, cursor: Cursor) -> None:
        """Write the frame `ready`: the position is accepted and nothing after it will be left out."""
        ...

    def caught_up(self, cursor: Cursor) -> None:
        """Write the frame `live`: everything up to `cursor` has been sent."""
        ...

    def reset(self, reason: ResetReason, snapshot: Snapshot, cursor: Cursor) -> None:
        """Write the frame `reset`, preceded by `ready` (cursor null, resumed false) when none was written yet.

        `cursor` is where the log goes on; it is the snapshot's, moved only where that one cannot be read from.
        """
        ...

    def want_head(self, generation: int, ask: Ask) -> None:
        """Ask for the sequence of the user's newest record → `Feed.head`.

        OPENING: `multi_last` by any replica, together with the watch's last answer (the first one is waited for).
        CHECK: a state asked from the leader after this call, then `multi_last` by any replica.
        LEADER: a state asked from the leader after this call, then `last_by_subj` by the leader; `up_to` is the
        `last_seq` of that state.
        """
        ...

    def want_page(self, generation: int, seq: int) -> None:
        """Ask any replica for the user's records from `seq` on, `seq` included → `Feed.page`."""
        ...

    def want_next(self, generation: int, seq: int) -> None:
        """Ask the leader for the user's first record at or after `seq` → `Feed.next`."""
        ...

    def want_state(self, generation: int) -> None:
        """Ask the leader for its state, the question sent after this call → `Feed.leader`."""
        ...

    def want_snapshot(self, generation: int, reason: ResetReason) -> None:
        """Ask the projections for the user's snapshot → `Feed.snapshot`, with None when there is none to be had.

        The owner may close the feed instead: a snapshot that can be read a moment later is worth a reconnect.
        """
        ...

    def later(self, generation: int, delay_seconds: float, ask: Ask) -> None:
        """Call `Feed.timer(generation, ask)` after `delay_seconds`."""
        ...
