"""The half of a feed that sends: live copies straight out, what was missed by way of pages read from the log.

`gateway.join.feed` has the other half: joining, checking, resetting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from gateway.join.port import Ask, FeedCounters, LogState, Message, Port, ResetReason, State
from seamark.backoff import doubled_seconds
from seamark.protocol.cursor import Cursor

PARKED_LIMIT: Final = 256
"""Live copies kept while the feed reads. Only a cache: without it the feed reads more, nothing else."""
CHECK_AFTER_SECONDS: Final = 1.0
"""On a cluster a confirmed SUB orders nothing on the leader's server: what slipped through is found by this check."""
BACKOFF_SECONDS: Final = 0.05
BACKOFF_LIMIT_SECONDS: Final = 2.0
TRIES: Final = 3
"""Answers by replicas that show too little before the leader is asked."""

_CATCH: Final = State.CATCH
_LIVE: Final = State.LIVE
ACTIVE: Final = (State.CATCH, State.LIVE)


class CatchUp(ABC):
    """Sends records in log order, each once, and reads what live copies leave out.

    Attributes:
        state: where the feed stands.
        epoch: incarnation of the log that `last` belongs to; empty before `resumed` or `reset`.
        last: nothing up to here is left to be sent. The highest sequence handed to the transport, a position taken
            over from a cursor or snapshot, or one that a check has found nothing below.
        generation: raised by every reset; answers to requests of an older generation are ignored.
    """

    __slots__ = (
        "_busy", "_counters", "_failures", "_gone_up_to", "_held", "_parked", "_parked_limit", "_past", "_port",
        "_read_from", "_said", "_tries", "_want", "epoch", "generation", "last", "state",
    )  # fmt: skip

    def __init__(self, port: Port, counters: FeedCounters, *, parked_limit: int = PARKED_LIMIT) -> None:
        """A feed that asks `port`, counts in `counters` and keeps at most `parked_limit` live copies while it reads."""
        self.state = State.OPEN
        self.epoch = ""
        self.last = 0
        self.generation = 0
        self._port = port
        self._counters = counters
        self._want = 0  # highest sequence heard of
        self._parked_limit = parked_limit
        self._parked: dict[int, tuple[int, Message, str]] | None = None  # sequence → (prev, message, epoch)
        self._busy = False  # a read or question is under way, or its retry is
        self._read_from = 0
        self._past = False  # the next read begins behind `last`
        self._held: tuple[Sequence[Message], bool] | None = None  # a page that waits for the leader's word
        self._gone_up_to = 0  # `_want` when the leader was asked for the next record
        self._tries = 0  # reads since `last` moved
        self._failures = 0  # questions without an answer since the last answer
        self._said = 0  # what the last frame that was not a record told the device

    @abstractmethod
    def check(self) -> None:
        """Compare with the head of the log, as something may have been lost, or the log is another."""

    @abstractmethod
    def _reset(self, reason: ResetReason) -> None:
        """Give the position up, by the leader's word."""

    # --- live copies

    def live(self, seq: int, prev: int, message: Message, epoch: str = "") -> None:
        """A live copy arrived: `prev` is the sequence of the user's preceding record, 0 if there is none.

        `epoch` is the incarnation of the log that it was written for, empty where it does not say. Sent under another epoch, a
        copy would hide every lower sequence of the new log for good.
        """
        if epoch != self.epoch and epoch and self.state in ACTIVE:
            self.check()
        elif self.state is _LIVE:
            last = self.last
            if seq <= last:
                return
            if prev <= last:
                if self._port.deliver(seq, message):
                    self.last = seq
                    return
                self._want = max(self._want, seq)
                self._without_room()
                return
            self._counters.repairs += 1
            self._park(seq, prev, message, epoch)
            self._catch_up()
        elif self.state is _CATCH and not self._busy:
            self._want = max(self._want, seq)  # without room no copy is kept: the record is read once there is room
        else:
            self._park(seq, prev, message, epoch)

    def _park(self, seq: int, prev: int, message: Message, epoch: str) -> None:
        """Remember that `seq` exists; keep the copy if there is a place for it."""
        if self.state is State.CLOSED:
            return
        self._want = max(self._want, seq)
        if self._parked is None:
            self._parked = {}
        elif len(self._parked) >= self._parked_limit:
            self._counters.overflows += 1
            self._parked.clear()
        self._parked[seq] = (prev, message, epoch)

    def _flush(self) -> None:
        """Everything heard of is shown: go LIVE, by way of the parked copies."""
        self.state = _LIVE
        self._busy = self._past = False
        self._tries = 0
        parked, self._parked = self._parked, None
        if parked:
            for seq in sorted(parked):
                self.live(seq, *parked[seq])
        self._settle()

    def _settle(self) -> None:
        if self.state is not _LIVE:
            return
        if self._want > self.last:
            self._catch_up()
        else:
            self._say_live()

    def _say_live(self) -> None:
        self._said = self.last
        self._port.caught_up(Cursor(self.epoch, self.last))

    # --- reading

    def writable(self) -> None:
        """There is room in the socket again."""
        if self.state is _CATCH and not self._busy:
            self._read()

    def _catch_up(self) -> None:
        self.state = _CATCH
        self._read()

    def _without_room(self) -> None:
        """The record just refused is read again once there is room; nothing that was accepted is taken back.

        Parked copies are dropped: a socket that does not read must cost no more than the bytes it has unsent.
        """
        self._counters.no_room += 1
        self._parked = None
        if self.state is not State.CLOSED:
            self.state = _CATCH
            self._busy = False

    def _read(self) -> None:
        """Ask for a page from `last` on, `last` included: to see it again proves that nothing was trimmed after it."""
        self._busy = self._port.room()
        if self._busy:
            self._read_from = self.last + self._past
            self._port.want_page(self.generation, self._read_from)

    def page(self, generation: int, messages: Sequence[Message], more: bool) -> None:
        """Answer to `want_page`: `messages` in log order; `more` when the replica holds further ones."""
        if generation != self.generation or self.state is not _CATCH:
            return
        self._failures = 0
        if not messages or messages[0].seq == self._read_from:
            self._show(messages, more)
        else:
            self._held = messages, more
            self._port.want_state(generation)

    def leader(self, generation: int, state: LogState) -> None:
        """Answer to `want_state`, asked after a page that did not prove itself or after the leader's `next`."""
        if generation != self.generation or self.state is not _CATCH:
            return
        self._failures = 0
        held, self._held = self._held, None
        if state.epoch != self.epoch:
            self._reset(ResetReason.EPOCH)
        elif self.last < state.floor:
            self._reset(ResetReason.TRIMMED)
        elif held is not None:
            self._show(*held)
        else:
            self._forget_gone()

    def _show(self, messages: Sequence[Message], more: bool) -> None:
        """Send a page known to be whole, as far as there is room."""
        before = self.last
        if messages:
            self._want = max(self._want, messages[-1].seq + more)
        for message in messages:
            if message.seq > self.last and not self._send(message.seq, message):
                break
        else:
            self._use_parked()
        if self.last > before:
            self._tries = 0
            self._past = False
        if self._busy and self.state is _CATCH:
            self._go_on(more and bool(messages), self.last > before)

    def _send(self, seq: int, message: Message) -> bool:
        if self._port.deliver(seq, message):
            self.last = seq
            return True
        self._without_room()
        return False

    def _use_parked(self) -> None:
        """Copies that follow upon a page spare the next. Without a predecessor, one may follow upon trimmed ones."""
        parked = self._parked or {}
        for seq in sorted(parked):
            prev, message, epoch = parked[seq]
            follows = 0 < prev <= self.last and epoch in ("", self.epoch)
            if seq > self.last and not (follows and self._send(seq, message)):
                break
            del parked[seq]

    def _go_on(self, more: bool, moved: bool) -> None:
        if self._want <= self.last:
            self._flush()
        elif more and (moved or not self._past):
            # A page that `last` alone has filled leads nowhere: begin behind it, and let the leader prove it whole.
            self._past = not moved
            self._read()
        else:
            self._stall()

    def _stall(self) -> None:
        """A replica showed less than what was heard of: try others, then ask the leader."""
        self._counters.fruitless_reads += 1
        self._tries += 1
        if self._tries < TRIES:
            self._port.later(self.generation, backoff_seconds(self._tries), Ask.PAGE)
        else:
            self._want_next()

    def _want_next(self) -> None:
        self._gone_up_to = self._want
        self._port.want_next(self.generation, self.last + 1)

    def next(self, generation: int, message: Message | None) -> None:
        """Answer to `want_next`: None when the leader holds nothing at or after the sequence asked for."""
        if generation != self.generation or self.state is not _CATCH:
            return
        self._failures = 0
        if message is not None:
            self._counters.leader_reads += 1
            self._held = (message,), True
        self._port.want_state(generation)

    def _forget_gone(self) -> None:
        """The leader holds nothing above `last` and has trimmed nothing there: what was heard of has been erased.

        Or the leader was just elected and is still applying what it holds: a check goes after it.
        """
        self._counters.gone += 1
        self._port.later(self.generation, CHECK_AFTER_SECONDS, Ask.CHECK)
        limit = self._gone_up_to
        if self._parked is not None:
            self._parked = {seq: entry for seq, entry in self._parked.items() if seq > limit}
        if self._want <= limit:
            self._want = self.last
        self._flush()


def backoff_seconds(attempt: int) -> float:
    """50 ms, 100 ms, … up to 2 s; `attempt` counts from 1."""
    return doubled_seconds(attempt, BACKOFF_SECONDS, BACKOFF_LIMIT_SECONDS)
