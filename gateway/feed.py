"""The join of history and live for one followed log: pure, synchronous, without I/O.

A `Feed` hears of records in three ways (live copies, pages read from a replica, heads) of which none can be trusted to
be complete, and hands them to its owner's `Port` in log order, each once, without a hole that was not announced by a
reset. A replica is believed when it shows something, never when it shows nothing: whatever would skip or reset is asked
from the leader first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine.cursor import Cursor
from gateway.port import START, Ask, FeedCounters, LogState, Message, Port, ResetReason, Snapshot, Start, State

__all__ = [
    "START", "Ask", "Feed", "FeedCounters", "LogState", "Message", "Port", "ResetReason", "Snapshot", "Start", "State",
]  # fmt: skip

PARKED_LIMIT: Final = 256
"""Live copies kept while the feed reads. Only a cache: without it the feed reads more, nothing else."""
CHECK_AFTER_SECONDS: Final = 1.0
"""On a cluster a confirmed SUB orders nothing on the leader's server: what slipped through is found by this check."""
BACKOFF_SECONDS: Final = 0.05
BACKOFF_LIMIT_SECONDS: Final = 2.0
TRIES: Final = 3
"""Fruitless answers of replicas before the leader is asked."""
FUTURE_DELAY_SECONDS: Final = 0.25
"""A leader just elected may still be applying what it holds: it is asked twice before a cursor is called too high."""


class Feed:
    """One session's way through one log.

    The owner confirms the live subscription, calls `hello` once, and from then on hands over what arrives: live copies
    (`live`), answers to what the port was asked for (`head`, `page`, `next`, `leader`, `snapshot`, `failed`, `timer`),
    answers of the watch (`watch`), and `writable`. `check` is called every 30 s and after anything that may have cost
    live copies: a reconnect, a slow-consumer error, an advisory of a new leader.

    `last` is the highest sequence handed to the transport, or a position taken over from a cursor or snapshot.
    """

    __slots__ = ()

    last: int
    """Sequence of the cursor this session holds. Meaningful once `resumed` or `reset` was called."""
    state: State
    epoch: str
    generation: int
    """Raised by every reset; answers to requests of an older generation are ignored."""

    def __init__(self, port: Port, counters: FeedCounters) -> None:
        """A feed that asks `port` and counts in `counters`."""

    def hello(self, cursor: Cursor | Start | None) -> None:
        """Begin at `cursor`, at the oldest record (`START`), or with a snapshot (None).

        The live subscription must be confirmed before this call.
        """

    def live(self, seq: int, prev: int, message: Message) -> None:
        """A live copy arrived: `prev` is the sequence of the user's preceding record, 0 if there is none."""

    def head(self, generation: int, ask: Ask, seq: int, up_to: int, state: LogState) -> None:
        """Answer to `want_head`: the newest record is `seq` (0: none) in a view that ends at `up_to`.

        `state` is the leader's, as `Port.want_head` says for each `ask`.
        """

    def page(self, generation: int, messages: Sequence[Message], more: bool) -> None:
        """Answer to `want_page`: `messages` in log order; `more` when the replica holds further ones."""

    def next(self, generation: int, message: Message | None) -> None:
        """Answer to `want_next`: None when the leader holds nothing at or after the sequence asked for."""

    def leader(self, generation: int, state: LogState) -> None:
        """Answer to `want_state`."""

    def snapshot(self, generation: int, snapshot: Snapshot | None) -> None:
        """Answer to `want_snapshot`."""

    def failed(self, generation: int, ask: Ask) -> None:
        """A request (not the one for a snapshot) got no answer. It is asked again after a while."""

    def timer(self, generation: int, ask: Ask) -> None:
        """A delay asked for with `Port.later` has passed."""

    def watch(self, state: LogState) -> None:
        """The watch had an answer from the leader.

        Answers come in the order of their questions, and every question was sent after the answer before it was handed
        over. An answer is handed to all feeds of its partition.
        """

    def check(self) -> None:
        """Compare with the head of the log, as something may have been lost."""

    def writable(self) -> None:
        """There is room in the socket again."""

    @property
    def pos(self) -> int:
        """Sequence up to which nothing is left to be sent: `last`, or higher where the log holds nothing above it."""
        return 0

    def advance(self) -> Cursor | None:
        """The cursor for a frame `pong`, which the device holds from now on; None before `resumed` or `reset`."""

    def close(self) -> None:
        """Ignore everything from now on."""
