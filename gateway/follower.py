"""One session's way through its user's log: carries out what the `Feed` decides, and keeps what was sent."""

from __future__ import annotations

from collections.abc import Callable
from time import time
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from engine.cursor import START, Cursor, parse_cursor
from engine.errors import InvalidCursor
from gateway.feed import Feed
from gateway.frames import live_frame
from gateway.message import Message
from gateway.port import Ask, FeedCounters, LogState, Port, ResetReason, Snapshot
from gateway.receipts import Tally

if TYPE_CHECKING:
    from gateway.live import UserLog
    from gateway.outlet import Outlet
    from gateway.partition import Partition
    from gateway.session import Session

NO_EPOCH: Final = "-"
"""Epoch of a cursor that cannot be read: no stream has it, so the feed answers it with a reset, as any foreign one."""


class Follower:
    """The `Port` of one feed.

    Attributes:
        sent: sequence of the last cursor the client was sent: `prev` of the next frame.
        sent_max: the highest of them in this epoch: what the client may acknowledge.
    """

    __slots__ = (
        "_epoch_bytes",
        "_outlet",
        "_session",
        "_start",
        "epoch",
        "feed",
        "former_epoch",
        "log",
        "partition",
        "sent",
        "sent_max",
        "snapshot",
        "tally",
    )  # fmt: skip

    def __init__(
        self, session: Session, outlet: Outlet, partition: Partition, cursor: str | None, *, snapshot: bool = False
    ) -> None:
        self._session = session
        self._outlet = outlet
        self._start = None if snapshot else _parse(cursor)
        self.snapshot = snapshot
        self._epoch_bytes = b""
        self.partition = partition
        self.feed = Feed(self, session.context.counters)
        self.log: UserLog | None = None
        self.epoch = ""
        self.former_epoch = ""
        self.sent = 0
        self.sent_max = 0
        self.tally = Tally(0)

    # --- what happens to the log ------------------------------------------------------------------------------------

    def joined(self) -> None:
        """The live subscription is confirmed, so no change of the count can be missed: read it, then begin."""
        if not self._session.ended and self.log is not None:
            self.partition.counts.ask(self.log.user, self._counted)

    def _counted(self, count: dict[str, Any] | None) -> None:
        if not self._session.ended and self.log is not None:
            self._session.counted(self.log.counted(count))
            session, tables = self._session, self._session.context.tables
            if self.snapshot:
                self._guard(self.feed.hello, None, ResetReason.SNAPSHOT)
            elif self._start is None and tables is not None:
                tables.device_cursor(session.tenant, session.user, session.device, self._begin)
            else:
                self._begin(self._start)

    def _begin(self, start: Cursor | Literal["start"] | None) -> None:
        """Say hello with the client's cursor, or with the one that the device is known to have acknowledged."""
        if not self._session.ended:
            self._guard(self.feed.hello, start)

    def live(self, seq: int, prev: int, message: Message) -> None:
        """A live copy."""
        try:
            self.feed.live(seq, prev, message)
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
        self._outlet.send(live_frame(cursor), self._epoch_bytes, cursor.seq)
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
        if cursor.epoch != self.epoch:
            if self.epoch and self.log is not None:
                self.log.forget_count()
            self.former_epoch, self.epoch = self.epoch, cursor.epoch
            self._epoch_bytes = cursor.epoch.encode()
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
        self._session.context.snapshots(
            self._session.tenant,
            self._session.user,
            lambda snapshot: self._guard(self.feed.snapshot, generation, snapshot),
        )

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


def _parse(cursor: str | None) -> Cursor | Literal["start"] | None:
    if cursor is None:
        return None
    if cursor == START:
        return "start"
    try:
        return parse_cursor(cursor)
    except InvalidCursor:
        return Cursor(NO_EPOCH, 0)
