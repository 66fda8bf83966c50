"""One session's way through its user's log: carries out what the `Feed` decides, and keeps what was sent."""

from __future__ import annotations

from collections.abc import Callable
from time import time
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from gateway.join.feed import Feed
from gateway.join.port import Ask, FeedCounters, LogState, Port, ResetReason, Snapshot
from gateway.log.message import Message
from gateway.session.frames import live_frame
from gateway.session.receipts import Tally
from gateway.stores.tables import NotRead
from seamark.protocol.cursor import START, Cursor, parse_cursor
from seamark.protocol.errors import InvalidCursor

if TYPE_CHECKING:
    from gateway.log.live import UserLog
    from gateway.log.partition import Partition
    from gateway.session.outlet import Outlet
    from gateway.session.session import Session

_Start = Cursor | Literal["start", ResetReason.SNAPSHOT] | None
"""Where a session begins: at a cursor, at the oldest record, with a snapshot, or where the device is known to stand."""

NO_EPOCH: Final = "-"
"""Epoch of a cursor that cannot be read: no stream has it, so the feed answers it with a reset, as any foreign one."""


class Follower:
    """The `Port` of one feed.

    Attributes:
        sent: sequence of the last cursor the client was sent: `prev` of the next frame.
        sent_max: the highest of them in this epoch since the last reset: what the client may acknowledge.
        sent_before_reset: the highest before that reset. The log may have gone back, and other records may have these
            sequences now: an acknowledgement up to here may mean what the reset took back.
    """

    __slots__ = ("_epoch_bytes", "_outlet", "_session", "_start", "epoch", "feed", "former_epoch", "log", "partition",
                 "sent", "sent_before_reset", "sent_max", "tally")  # fmt: skip

    def __init__(
        self, session: Session, outlet: Outlet, partition: Partition, cursor: str | None, *, snapshot: bool = False
    ) -> None:
        self._session = session
        self._outlet = outlet
        self._start = ResetReason.SNAPSHOT if snapshot else _parse(cursor)
        self._epoch_bytes = b""
        self.partition = partition
        self.feed = Feed(self, session.context.counters)
        self.log: UserLog | None = None
        self.epoch = ""
        self.former_epoch = ""
        self.sent = 0
        self.sent_max = 0
        self.sent_before_reset = 0
        self.tally = Tally(0)

    # --- what happens to the log ------------------------------------------------------------------------------------

    def joined(self) -> None:
        """The live subscription is confirmed, so no change of the count can be missed: read it, then begin."""
        if not self._session.ended and self.log is not None:
            self.partition.counts.ask(self.log.user, lambda count: self._guard(self._counted, count))

    def _counted(self, count: dict[str, Any] | None) -> None:
        if not self._session.ended and self.log is not None:
            self._session.counted(self.log.counted(count))
            session, tables = self._session, self._session.context.tables
            if self._start is None and tables is not None:
                tables.device_cursor(session.tenant, session.user, session.device, self._begin)
            else:
                self._begin(self._start)

    def _begin(self, start: _Start | NotRead) -> None:
        """Say hello with the client's cursor, or with the one that the device is known to have acknowledged."""
        if self._session.ended:
            return
        if start is NotRead.TOO_MANY:
            self._session.overloaded()
        elif isinstance(start, ResetReason):
            self._guard(self.feed.hello, None, start)
        else:
            self._guard(self.feed.hello, None if start is NotRead.AWAY else start)

    def live(self, seq: int, prev: int, message: Message, epoch: str) -> None:
        """A live copy."""
        try:
            self.feed.live(seq, prev, message, epoch)
        except Exception as error:
            self._session.failed(error)

    def unread(self, payload: bytes) -> None:
        """A new unread count for the user."""
        self._session.unread(payload)

    def watch(self, state: LogState) -> None:
        """The leader said how its stream stands."""
        self._guard(self.feed.watch, state)

    def check(self) -> None:
        """Something may have been lost."""
        self._guard(self.feed.check)

    def writable(self) -> None:
        """The socket has room again."""
        self._guard(self.feed.writable)

    def close(self) -> None:
        """The session is over. Feed and follower refer to each other: parted, they go without the garbage collector."""
        self.feed.close()
        self.feed = _CLOSED

    # --- Port: towards the client -----------------------------------------------------------------------------------

    def room(self) -> bool:
        """Whether the outlet takes another record."""
        return self._outlet.room()

    def deliver(self, seq: int, message: Any) -> bool:
        """The hot path: the frame of one record, built once for all sessions that hold the same cursor."""
        outlet = self._outlet
        if not outlet.room():
            return False
        epoch = self._epoch_bytes
        outlet.send(message.frame(self.sent, epoch), epoch, seq)
        self.sent = seq
        if seq > self.sent_max:  # noqa: PLR1730 - the hot path: a comparison costs a third of a call of max()
            self.sent_max = seq
        tally = self.tally
        tally.sent = seq
        tally.sent_at = time()
        if not tally.noted:
            tally.noted = True
            self._session.context.receipts.note(self._session)
        return True

    def resumed(self, cursor: Cursor) -> None:
        """Frame `ready`."""
        self._adopt(cursor)
        self._session.ready(cursor)

    def caught_up(self, cursor: Cursor) -> None:
        """Frame `live`."""
        outlet = self._outlet
        outlet.send(live_frame(cursor), self._epoch_bytes, cursor.seq)
        if outlet.tells_live:
            self._moved(cursor.seq)

    def reset(self, reason: ResetReason, snapshot: Snapshot, cursor: Cursor) -> None:
        """Frame `reset`, after `ready` where none was sent yet."""
        self._session.tell_receipts()
        self._adopt(cursor)
        self._session.reset(reason, snapshot, cursor)

    def pong(self) -> Cursor | None:
        """The cursor of a `pong`, which moves the client's."""
        cursor = self.feed.advance()
        if cursor is not None:
            self._moved(cursor.seq)
        return cursor

    def _adopt(self, cursor: Cursor) -> None:
        if self.epoch and self.log is not None:
            self.log.forget_count()  # the log may have gone back, or be another
        if cursor.epoch != self.epoch:
            self.former_epoch, self.epoch = self.epoch, cursor.epoch
            self._epoch_bytes = cursor.epoch.encode()
            self.sent_before_reset = 0
        else:
            self.sent_before_reset = max(self.sent_before_reset, self.sent_max)
        self.sent_max = 0
        self.tally = Tally(cursor.seq)
        self._moved(cursor.seq)

    def _moved(self, seq: int) -> None:
        self.sent = seq
        self.sent_max = max(self.sent_max, seq)

    # --- Port: questions --------------------------------------------------------------------------------------------

    def want_head(self, generation: int, ask: Ask) -> None:
        """The newest record of the user."""
        if ask is Ask.LEADER:
            self.partition.watch.ask(lambda state: self._leader_head(generation, state))
            return

        def answer(seq: int, up_to: int, state: LogState | None) -> None:
            if state is None:
                self._guard(self.feed.failed, generation, ask)
            else:
                self._guard(self.feed.head, generation, ask, seq, up_to, state)

        heads = self.partition.heads
        (heads.opening if ask is Ask.OPENING else heads.check)(self._subject, answer)

    def _leader_head(self, generation: int, state: LogState | None) -> None:
        if state is None:
            self._guard(self.feed.failed, generation, Ask.LEADER)
            return

        def answer(seq: int | None) -> None:
            if seq is None:
                self._guard(self.feed.failed, generation, Ask.LEADER)
            else:
                self._guard(self.feed.head, generation, Ask.LEADER, seq, state.last_seq, state)

        self.partition.reader.last(self._subject, answer)

    def want_page(self, generation: int, seq: int) -> None:
        """Records from `seq` on."""

        def answer(messages: list[Message] | None, more: bool) -> None:
            if messages is None:
                self._guard(self.feed.failed, generation, Ask.PAGE)
            else:
                self._guard(self.feed.page, generation, messages, more)

        self.partition.reader.page(self._subject, seq, answer)

    def want_next(self, generation: int, seq: int) -> None:
        """The leader's first record at or after `seq`."""

        def answer(message: Message | None, answered: bool) -> None:
            if answered:
                self._guard(self.feed.next, generation, message)
            else:
                self._guard(self.feed.failed, generation, Ask.NEXT)

        self.partition.reader.next(self._subject, seq, answer)

    def want_state(self, generation: int) -> None:
        """The leader's state."""

        def answer(state: LogState | None) -> None:
            if state is None:
                self._guard(self.feed.failed, generation, Ask.STATE)
            else:
                self._guard(self.feed.leader, generation, state)

        self.partition.watch.ask(answer)

    def want_snapshot(self, generation: int, reason: ResetReason) -> None:
        """The user's snapshot from the projections."""

        def answer(snapshot: Snapshot | None) -> None:
            if snapshot is None:
                self._session.overloaded()
            else:
                self._guard(self.feed.snapshot, generation, snapshot)

        self._session.context.snapshots(self._session.tenant, self._session.user, answer)

    def later(self, generation: int, delay_seconds: float, ask: Ask) -> None:
        """A timer."""
        self._session.context.wheel.later(delay_seconds, self._timer, generation, ask)

    def _timer(self, generation: int, ask: Ask) -> None:
        self._guard(self.feed.timer, generation, ask)

    @property
    def _subject(self) -> str:
        assert self.log is not None, "the log is joined before the feed begins"
        return self.log.subject

    def _guard(self, act: Callable[..., None], *args: object) -> None:
        """A fault in one session ends that session, not the task or callback that serves all of them."""
        try:
            act(*args)
        except Exception as error:
            self._session.failed(error)


_CLOSED: Final = Feed(cast("Port", None), FeedCounters())
"""Takes late answers to requests of a follower that is over: of a generation that no request has."""
_CLOSED.close()
_CLOSED.generation = -1


def _parse(cursor: str | None) -> _Start:
    if cursor is None:
        return None
    if cursor == START:
        return "start"
    try:
        return parse_cursor(cursor)
    except InvalidCursor:
        return Cursor(NO_EPOCH, 0)
