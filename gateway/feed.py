"""The join of history and live for one followed log: pure, synchronous, without I/O.

A `Feed` hears of records in three ways (live copies, pages read from a replica, heads) of which none can be trusted to
be complete, and hands them to its owner's `Port` in log order, each once, without a hole that was not announced by a
reset. A replica is believed when it shows something, never when it shows nothing: whatever would skip or reset is asked
from the leader first.

What is taken for granted: age trims from the front only, nothing within the minute it was stored in, and not past the
middle of the log between two answers of the watch; no replica shows, and no live copy brings, anything of an older
incarnation of the log once the leader tells of the newer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

from engine.cursor import Cursor
from gateway.port import (
    Ask,
    FeedCounters,
    LogState,
    Message,
    Port,
    ResetReason,
    Snapshot,
    State,
)

__all__ = ["Ask", "Feed", "FeedCounters", "LogState", "Message", "Port", "ResetReason", "Snapshot", "State"]

PARKED_LIMIT: Final = 256
"""Live copies kept while the feed reads. Only a cache: without it the feed reads more, nothing else."""
CHECK_AFTER_SECONDS: Final = 1.0
"""On a cluster a confirmed SUB orders nothing on the leader's server: what slipped through is found by this check."""
BACKOFF_SECONDS: Final = 0.05
BACKOFF_LIMIT_SECONDS: Final = 2.0
TRIES: Final = 3
"""Answers by replicas that show too little before the leader is asked."""
FUTURE_DELAY_SECONDS: Final = 0.25
"""A leader just elected may still be applying what it holds: it is asked twice before a cursor is called too high."""

_OPEN: Final = State.OPEN
_CATCH: Final = State.CATCH
_LIVE: Final = State.LIVE
_RESET: Final = State.RESET


class Feed:
    """One session's way through one log.

    The owner confirms the live subscription, calls `hello` once, and from then on hands over what arrives: live copies
    (`live`), answers to what the port was asked for (`head`, `page`, `next`, `leader`, `snapshot`, `failed`, `timer`),
    answers of the watch (`watch`), and `writable`. `check` is called every 30 s and after anything that may have cost
    live copies: a reconnect, a slow-consumer error, an advisory of a new leader.
    """

    __slots__ = (
        "_asked", "_at_watch", "_behind", "_busy", "_check_again", "_checking", "_counters", "_cursor", "_failures",
        "_gone_up_to", "_head_tries", "_held", "_parked", "_parked_limit", "_past", "_port", "_read_from", "_reason",
        "_said", "_snapshot", "_tries", "_want", "epoch", "generation", "last", "state",
    )  # fmt: skip

    def __init__(self, port: Port, counters: FeedCounters, *, parked_limit: int = PARKED_LIMIT) -> None:
        """A feed that asks `port`, counts in `counters` and keeps at most `parked_limit` live copies while it reads."""
        self.state = _OPEN
        self.epoch = ""
        """Incarnation of the log that `last` belongs to; empty before `resumed` or `reset`."""
        self.last = 0
        """Nothing up to here is left to be sent: the highest sequence handed to the transport, a position taken over
        from a cursor or snapshot, or one that a heads check has found nothing below."""
        self.generation = 0
        """Raised by every reset; answers to requests of an older generation are ignored."""
        self._port = port
        self._counters = counters
        self._cursor: Cursor | Literal["start"] | None = None  # what hello brought
        self._want = 0  # highest sequence heard of
        self._parked_limit = parked_limit
        self._parked: dict[int, tuple[int, Message]] | None = None  # sequence → (prev, message)
        self._busy = False  # a read or question is under way, or its retry is
        self._read_from = 0
        self._past = False  # the next read begins behind `last`
        self._held: tuple[Sequence[Message], bool] | None = None  # a page that waits for the leader's word
        self._gone_up_to = 0  # `_want` when the leader was asked for the next record
        self._tries = 0  # reads since `last` moved
        self._failures = 0  # questions without an answer since the last answer
        self._checking = False
        self._check_again = False
        self._head_tries = 0
        self._asked = 0  # what was known when the head was asked for
        self._said = 0  # what the last frame that was not a record told the device
        self._at_watch = -1  # `last` when the last answer of the watch came, so before the next question was sent
        self._behind = 0  # answers in a row by which the log ends before `last`
        self._reason = ResetReason.NEW
        self._snapshot: Snapshot | None = None

    def advance(self) -> Cursor | None:
        """The cursor for a frame `pong`, which the device holds from now on; None before `resumed` or `reset`."""
        if not self.epoch:
            return None
        self._said = self.last
        return Cursor(self.epoch, self.last)

    def close(self) -> None:
        """Ignore everything from now on."""
        self.state = State.CLOSED
        self.generation += 1
        self._parked = self._held = self._snapshot = None

    # --- joining

    def hello(self, cursor: Cursor | Literal["start"] | None) -> None:
        """Begin at `cursor`, at the oldest record kept (`engine.cursor.START`), or with a snapshot (None).

        The live subscription must be confirmed before this call.
        """
        if self.state is not _OPEN:
            return
        self._cursor = cursor
        if cursor is None:
            self._reset(ResetReason.NEW)
            return
        if isinstance(cursor, Cursor):
            self.last = cursor.seq
            self._want_head(Ask.OPENING)
        else:
            self._want_head(Ask.LEADER)

    def head(self, generation: int, ask: Ask, seq: int, up_to: int, state: LogState) -> None:
        """Answer to `want_head`: the newest record is `seq` (0: none) in a view that ends at `up_to`.

        `state` is the leader's, as `Port.want_head` says for each `ask`.
        """
        if generation != self.generation:
            return
        self._failures = 0
        if self.state is _OPEN:
            self._opened(ask, seq, up_to, state)
        elif self.state is _RESET:
            self._begin_anew(seq, state)
        else:
            self._checked(ask, seq, up_to, state)

    def _opened(self, ask: Ask, head: int, up_to: int, log: LogState) -> None:
        """Accept the cursor or reset. The watch's answer will do for what only grows worse with time (trimming)."""
        cursor = self._cursor
        if not isinstance(cursor, Cursor):
            self.last = _floor(log)
            self._accept(head, log)
        elif log.epoch != cursor.epoch:
            if ask is Ask.LEADER:
                self._reset(ResetReason.EPOCH)
            else:
                self._want_head(Ask.LEADER)
        elif cursor.seq < _floor(log):
            self._reset(ResetReason.TRIMMED)
        elif ask is Ask.LEADER and log.last_seq < cursor.seq:
            self._behind += 1
            if self._behind == 1:
                self._port.later(self.generation, FUTURE_DELAY_SECONDS, Ask.LEADER)
            else:
                self._reset(ResetReason.FUTURE)
        elif ask is Ask.LEADER or not self._is_stale(up_to, log):
            self._accept(head, log)

    def _accept(self, head: int, log: LogState) -> None:
        self.epoch = log.epoch
        self._port.resumed(Cursor(self.epoch, self.last))
        self._join(head, log)

    def _join(self, head: int, log: LogState) -> None:
        """Go on from `last`, a position; `head` is the newest record by a view that is not stale."""
        self._behind = 0
        self._at_watch = -1
        self._said = self.last
        self._want = max(self._want, head)
        self.state = _CATCH
        self._port.later(self.generation, CHECK_AFTER_SECONDS, Ask.CHECK)
        if self._want > self.last:
            self._read()
        elif _in_older_half(self.last, log):
            # What came after may have been trimmed since `log` was told: an empty page, held for the leader's word.
            self._busy = True
            self._held = (), False
            self._port.want_state(self.generation)
        else:
            self._flush()

    # --- live copies

    def live(self, seq: int, prev: int, message: Message) -> None:
        """A live copy arrived: `prev` is the sequence of the user's preceding record, 0 if there is none."""
        if self.state is _LIVE:
            last = self.last
            if seq <= last:
                return
            if prev <= last:
                if self._port.deliver(seq, message):
                    self.last = seq
                    return
                self._park(seq, prev, message)
                self._without_room()
                return
            self._counters.repairs += 1
            self._park(seq, prev, message)
            self._catch_up()
        else:
            self._park(seq, prev, message)

    def _park(self, seq: int, prev: int, message: Message) -> None:
        """Remember that `seq` exists; keep the copy if there is a place for it."""
        if self.state is State.CLOSED:
            return
        self._want = max(self._want, seq)
        if self._parked is None:
            self._parked = {}
        elif len(self._parked) >= self._parked_limit:
            self._counters.overflows += 1
            self._parked.clear()
        self._parked[seq] = (prev, message)

    def _flush(self) -> None:
        """Everything heard of is shown: go LIVE, by way of the parked copies."""
        self.state = _LIVE
        self._busy = self._past = False
        self._tries = 0
        parked, self._parked = self._parked, None
        for seq in sorted(parked or ()):
            self.live(seq, *parked[seq])  # type: ignore[index]  # not None, or there were no seq
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
        """The record just refused is read again once there is room; nothing that was accepted is taken back."""
        self._counters.no_room += 1
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
        elif self.last < _floor(state):
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
            prev, message = parked[seq]
            if seq > self.last and not (0 < prev <= self.last and self._send(seq, message)):
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
            self._port.later(self.generation, _backoff_seconds(self._tries), Ask.PAGE)
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

    # --- checks

    def check(self) -> None:
        """Compare with the head of the log, as something may have been lost."""
        if self.state is not _CATCH and self.state is not _LIVE:
            return
        if self._checking:
            self._check_again = True  # the one under way may have been asked before the loss
            return
        self._checking = True
        self._head_tries = 0
        self._want_head(Ask.CHECK)

    def _want_head(self, ask: Ask) -> None:
        self._asked = max(self.last, self._want)
        self._port.want_head(self.generation, ask)

    def _is_stale(self, up_to: int, log: LogState) -> bool:
        """Whether a replica answered from before what was known when it was asked; asks again if so."""
        if up_to >= max(log.last_seq, self._asked):
            return False
        self._counters.stale_heads += 1
        self._head_tries += 1
        again = Ask.OPENING if self.state is _OPEN else Ask.CHECK
        self._want_head(again if self._head_tries < TRIES - 1 else Ask.LEADER)
        return True

    def _checked(self, ask: Ask, head: int, up_to: int, log: LogState) -> None:
        if log.epoch != self.epoch:
            self._reset(ResetReason.EPOCH)
            return
        if ask is Ask.CHECK and self._is_stale(up_to, log):
            return
        self._checking = False
        self._want = max(self._want, head)
        if self.state is _LIVE:
            if self._want > self.last:
                self._counters.missed += 1
                self._catch_up()
            else:
                self.last = max(self.last, up_to)  # a view is a prefix of the log: nothing can appear below its end
                if self._said < self.last and _in_older_half(self._said, log):
                    self._say_live()  # an idle device's cursor must not age until it is trimmed
        if self._check_again:
            self._check_again = False
            self.check()

    def watch(self, state: LogState) -> None:
        """The watch had an answer from the leader.

        Answers come in the order of their questions, and every question was sent after the answer before it was handed
        over. An answer is handed to all feeds of its partition.
        """
        if self.state is not _LIVE and self.state is not _CATCH:
            return
        at_watch, self._at_watch = self._at_watch, self.last
        if at_watch < 0:
            return  # its question may be older than this feed's position
        if state.epoch != self.epoch:
            self._reset(ResetReason.EPOCH)
            return
        if self._parked and max(self._parked) > state.last_seq:
            self._parked = None  # newer than the answer, which costs a read, or of a past that the log has lost
        self._behind = self._behind + 1 if state.last_seq < at_watch else 0
        if self._behind == 2:
            self._reset(ResetReason.FUTURE)

    # --- when nothing answers

    def failed(self, generation: int, ask: Ask) -> None:
        """A request (not the one for a snapshot) got no answer. It is asked again after a while."""
        if generation != self.generation:
            return
        self._counters.failures += 1
        self._failures += 1
        if ask in (Ask.LEADER, Ask.CHECK) and self.state in (_CATCH, _LIVE):
            self._checking = self._check_again = False
            ask = Ask.CHECK
        self._port.later(generation, _backoff_seconds(self._failures), ask)

    def timer(self, generation: int, ask: Ask) -> None:
        """A delay asked for with `Port.later` has passed."""
        if generation != self.generation:
            return
        if ask is Ask.CHECK:
            self.check()
        elif ask is Ask.OPENING or ask is Ask.LEADER:
            self._want_head(ask)
        elif ask is Ask.PAGE:
            self._read()
        elif ask is Ask.NEXT:
            self._want_next()
        else:
            self._port.want_state(generation)

    # --- resets

    def _reset(self, reason: ResetReason) -> None:
        """Give the position up. The snapshot comes first and the leader is asked after it: see `_begin_anew`."""
        self.state = _RESET
        self.generation += 1
        self._reason = reason
        self._held = None
        self._busy = self._past = self._checking = self._check_again = False
        self._tries = self._failures = self._head_tries = 0
        self._port.want_snapshot(self.generation, reason)

    def snapshot(self, generation: int, snapshot: Snapshot | None) -> None:
        """Answer to `want_snapshot`."""
        if generation == self.generation and self.state is _RESET:
            self._snapshot = snapshot
            self._want_head(Ask.LEADER)

    def _begin_anew(self, head: int, log: LogState) -> None:
        """Go on from the snapshot's own position: what lies between it and the head is in neither otherwise.

        As the leader was asked after the snapshot was taken, a checkpoint beyond its end is one of lost history.
        """
        snapshot = self._snapshot or Snapshot(None)
        checkpoint = snapshot.checkpoint
        if checkpoint is None or checkpoint.epoch != log.epoch or checkpoint.seq > log.last_seq:
            snapshot = replace(snapshot, checkpoint=None, inbox=(), stale=True)
            seq = log.last_seq if self._reason is ResetReason.NEW else _floor(log)
        elif checkpoint.seq < _floor(log):
            snapshot = replace(snapshot, stale=True)
            seq = _floor(log)
        else:
            seq = checkpoint.seq
        if self._reason in (ResetReason.EPOCH, ResetReason.FUTURE) or (self.epoch and self.epoch != log.epoch):
            self._parked = None
            self._want = 0
        self._snapshot = None
        self.epoch = log.epoch
        self.last = seq
        self._counters.resets[self._reason] += 1
        self._port.reset(self._reason, snapshot, Cursor(self.epoch, seq))
        self._join(head, log)


def _floor(log: LogState) -> int:
    """The lowest position from which nothing is missing; a stream that never held a message says `first_seq` 0."""
    return max(log.first_seq - 1, 0)


def _in_older_half(seq: int, log: LogState) -> bool:
    """Whether trimming may reach `seq` before the watch has its next answer."""
    return 2 * seq < log.first_seq + log.last_seq


def _backoff_seconds(attempt: int) -> float:
    """50 ms, 100 ms, … up to 2 s; `attempt` counts from 1."""
    return min(BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 10), BACKOFF_LIMIT_SECONDS)
