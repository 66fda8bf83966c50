"""The join of history and live for one followed log: pure, synchronous, without I/O.

A `Feed` hears of records in three ways (live copies, pages read from a replica, heads) of which none can be trusted to
be complete, and hands them to its owner's `Port` in log order, each once, without a hole that was not announced by a
reset. A replica is believed when it shows something, never when it shows nothing: whatever would skip or reset is asked
from the leader first.

What is taken for granted: age trims from the front only, nothing within the minute it was stored in, and not past the
middle of the log between two answers of the watch; no replica shows anything of an older incarnation of the log once the
leader tells of the newer one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

from gateway.join.catchup import ACTIVE, CHECK_AFTER_SECONDS, PARKED_LIMIT, TRIES, CatchUp, backoff_seconds
from gateway.join.port import Ask, FeedCounters, LogState, Message, Port, ResetReason, Snapshot, State
from seamark.protocol.cursor import Cursor

__all__ = ["Ask", "Feed", "FeedCounters", "LogState", "Message", "Port", "ResetReason", "Snapshot", "State"]

FUTURE_DELAY_SECONDS: Final = 0.25
"""A leader just elected may still be applying what it holds: it is asked twice before a cursor is called too high."""


class Feed(CatchUp):
    """One session's way through one log.

    The owner confirms the live subscription, calls `hello` once, and from then on hands over what arrives: live copies
    (`live`), answers to what the port was asked for (`head`, `page`, `next`, `leader`, `snapshot`, `failed`, `timer`),
    answers of the watch (`watch`), and `writable`. `check` is called every 30 s and after anything that may have cost
    live copies: a reconnect, a slow-consumer error, an advisory of a new leader.
    """

    __slots__ = (
        "_asked", "_at_watch", "_behind", "_check_again", "_checking", "_cursor", "_head_tries", "_reason", "_snapshot",
    )  # fmt: skip

    def __init__(self, port: Port, counters: FeedCounters, *, parked_limit: int = PARKED_LIMIT) -> None:
        """A feed that asks `port`, counts in `counters` and keeps at most `parked_limit` live copies while it reads."""
        super().__init__(port, counters, parked_limit=parked_limit)
        self._cursor: Cursor | Literal["start"] | None = None  # what hello brought
        self._checking = False
        self._check_again = False
        self._head_tries = 0
        self._asked = 0  # what was known when the head was asked for
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

    def hello(self, cursor: Cursor | Literal["start"] | None, reason: ResetReason = ResetReason.NEW) -> None:
        """Begin at `cursor`, at the oldest record kept (`START`), or with a snapshot (None, for `reason`).

        The live subscription must be confirmed before this call.
        """
        if self.state is not State.OPEN:
            return
        self._cursor = cursor
        if cursor is None:
            self._reset(reason)
            return
        if isinstance(cursor, Cursor):
            self.last = cursor.seq
            self._want_head(Ask.OPENING)
        else:
            self._want_head(Ask.LEADER)

    def rehydrate(self) -> None:
        """Give the position up and begin anew with a snapshot. Before `hello` there is none to give up."""
        if self.state in ACTIVE or (self.state is State.OPEN and self._cursor is not None):
            self._reset(ResetReason.SNAPSHOT)

    def head(self, generation: int, ask: Ask, seq: int, up_to: int, state: LogState) -> None:
        """Answer to `want_head`: the newest record is `seq` (0: none) in a view that ends at `up_to`.

        `state` is the leader's, as `Port.want_head` says for each `ask`.
        """
        if generation != self.generation:
            return
        self._failures = 0
        if self.state is State.OPEN:
            self._opened(ask, seq, up_to, state)
        elif self.state is State.RESET:
            self._begin_anew(seq, state)
        else:
            self._checked(ask, seq, up_to, state)

    def _opened(self, ask: Ask, head: int, up_to: int, log: LogState) -> None:
        """Accept the cursor or reset. The watch's answer will do for what only grows worse with time (trimming)."""
        cursor = self._cursor
        if not isinstance(cursor, Cursor):
            self.last = log.floor
            self._drop_parked()
            self._accept(head, log)
        elif log.epoch != cursor.epoch:
            if ask is Ask.LEADER:
                self._reset(ResetReason.EPOCH)
            else:
                self._want_head(Ask.LEADER)
        elif cursor.seq < log.floor:
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
        self.state = State.CATCH
        self._port.later(self.generation, CHECK_AFTER_SECONDS, Ask.CHECK)
        if self._want > self.last:
            self._read()
        elif log.is_old(self.last):
            # What came after may have been trimmed since `log` was told: an empty page, held for the leader's word.
            self._busy = True
            self._held = (), False
            self._port.want_state(self.generation)
        else:
            self._flush()

    # --- checks

    def check(self) -> None:
        """Compare with the head of the log, as something may have been lost."""
        if self.state not in ACTIVE:
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
        again = Ask.OPENING if self.state is State.OPEN else Ask.CHECK
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
        if self.state is State.LIVE:
            if self._want > self.last:
                self._counters.missed += 1
                self._catch_up()
            else:
                self.last = max(self.last, up_to)  # a view is a prefix of the log: nothing can appear below its end
                if self._said < self.last and log.is_old(self._said):
                    self._say_live()  # an idle device's cursor must not age until it is trimmed
        if self._check_again:
            self._check_again = False
            self.check()

    def watch(self, state: LogState) -> None:
        """The watch had an answer from the leader.

        Answers come in the order of their questions, and every question was sent after the answer before it was handed
        over. An answer is handed to all feeds of its partition.
        """
        if self.state not in ACTIVE:
            return
        at_watch, self._at_watch = self._at_watch, self.last
        if at_watch < 0:  # its question may be older than this feed's position
            if state.epoch != self.epoch:
                self.check()
            return
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
        if ask in (Ask.LEADER, Ask.CHECK) and self.state in ACTIVE:
            self._checking = self._check_again = False
            ask = Ask.CHECK
        self._port.later(generation, backoff_seconds(self._failures), ask)

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
        self.state = State.RESET
        self.generation += 1
        self._reason = reason
        self._held = None
        self._busy = self._past = self._checking = self._check_again = False
        self._tries = self._failures = self._head_tries = 0
        self._port.want_snapshot(self.generation, reason)

    def snapshot(self, generation: int, snapshot: Snapshot | None) -> None:
        """Answer to `want_snapshot`."""
        if generation == self.generation and self.state is State.RESET:
            self._snapshot = snapshot
            self._want_head(Ask.LEADER)

    def _begin_anew(self, head: int, log: LogState) -> None:
        """Go on from the snapshot's own position: what lies between it and the head is in neither otherwise.

        Without a snapshot the whole log is read, for a new device as well. For a projection that is away, or that follows
        another incarnation of the log, does not mean that there is nothing to show (ADR 0020). As the leader was asked after the
        snapshot was taken, a checkpoint beyond its end is one of lost history.
        """
        snapshot = self._snapshot or Snapshot(None)
        checkpoint = snapshot.checkpoint
        if checkpoint is None or checkpoint.epoch != log.epoch or checkpoint.seq > log.last_seq:
            snapshot = replace(snapshot, checkpoint=None, inbox=(), stale=True)
            seq = log.floor
        elif checkpoint.seq < log.floor:
            snapshot = replace(snapshot, stale=True)
            seq = log.floor
        else:
            seq = checkpoint.seq
        self._drop_parked()
        if self._reason in (ResetReason.EPOCH, ResetReason.FUTURE) or (self.epoch and self.epoch != log.epoch):
            self._want = 0
        self._snapshot = None
        self.epoch = log.epoch
        self.last = seq
        self._counters.resets[self._reason] += 1
        self._port.reset(self._reason, snapshot, Cursor(self.epoch, seq))
        self._join(head, log)

    def _drop_parked(self) -> None:
        """Drop the copies heard so far: the log may have gone back since, and then others have these sequences now.

        How far we have heard (`_want`) is kept: at worst that costs a read and a question too many.
        """
        self._parked = None
