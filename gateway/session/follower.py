"""One session's way through its user's log: carries out what the `Feed` decides, and keeps what was sent."""

from __future__ import annotations

from collections.abc import Callable
from time import time
from typing import Any, Final, Protocol, TypeVar, cast

from engine.broker.jetstream import Outgoing
from engine.traces.spans import active
from gateway import metrics
from gateway.context import Context
from gateway.join.feed import Feed
from gateway.join.port import Ask, FeedCounters, LogState, Port, ResetReason, Snapshot
from gateway.log.heads import Head
from gateway.log.live import UserLog
from gateway.log.message import Message
from gateway.log.partition import Partition
from gateway.log.reader import Page
from gateway.session.frames import epoch_in_frames
from gateway.session.outlet import Outlet
from gateway.session.receipts import Tally
from gateway.session.start import Start, start_at
from gateway.session.told_count import ToldCount
from gateway.session.traces import SessionTraces
from gateway.stores.snapshots import read_snapshot
from gateway.stores.tables import NotRead
from seamark.protocol.close_codes import OVERLOADED, CloseCode
from seamark.protocol.cursor import Cursor
from seamark.protocol.frames import LiveFrame, Pong, Ready, ResetFrame, Unread, encode

_JOINED = {reason: metrics.gateway_joins.labels(reason.value) for reason in ResetReason}
_NOW_SENT, _NOW_NO_ROOM, _NOW_EARLY = map(metrics.gateway_now_frames.labels, ("sent", "no_room", "early"))
_RESUMED = metrics.gateway_joins.labels("resumed")

_Answer = TypeVar("_Answer")


class Owner(Protocol):
    """The session that a log is followed for."""

    context: Context
    id: str
    tenant: str
    user: str
    device: str
    ended: bool

    def end(self, code: CloseCode, detail: str) -> None:
        """Close it."""

    def failed(self, error: Exception) -> None:
        """Close it after a fault of ours."""


class Follower:
    """The `Port` of one feed.

    Attributes:
        ack_opening: how SDKs begin an `ack` of a cursor of this epoch, up to its sequence.
        log: the user's, set once it is joined.
        takes_now: the client has declared the capability `now`.
        sent: sequence of the last cursor the client was sent: `prev` of the next frame.
        sent_max: the highest of them in this epoch since the last reset: what the client may acknowledge.
        sent_before_reset: the highest before that reset. The log may have gone back, and other records may have these
            sequences now: an acknowledgement up to here may mean what the reset took back.
    """

    __slots__ = ("_context", "_count", "_epoch_bytes", "_outlet", "_pong_owed", "_session", "_start", "ack_opening", "epoch",
                 "feed", "former_epoch", "log", "partition", "sent", "sent_before_reset", "sent_max", "takes_now", "tally",
                 "traces")  # fmt: skip

    def __init__(
        self, session: Owner, outlet: Outlet, partition: Partition, cursor: str | None, *, snapshot: bool = False
    ) -> None:
        self._session = session
        self._context = session.context
        self._outlet = outlet
        self._start = ResetReason.SNAPSHOT if snapshot else start_at(cursor)
        self._count = ToldCount(outlet)
        self._pong_owed = False
        self._epoch_bytes, self.ack_opening = epoch_in_frames("")
        self.partition = partition
        self.feed = Feed(self, session.context.counters)
        self.log: UserLog | None = None
        self.epoch = ""
        self.former_epoch = ""
        self.takes_now = False
        self.sent = 0
        self.sent_max = 0
        self.sent_before_reset = 0
        self.tally = Tally(0)
        device, recent = (session.tenant, session.user, session.device), session.context.recent_traces
        self.traces = None if (spans := active()) is None else SessionTraces(spans, device, recent)

    # --- what happens to the log ------------------------------------------------------------------------------------

    def joined(self) -> None:
        """The live subscription is confirmed, so no change of the count can be missed: read it, then begin."""
        if not self._session.ended and self.log is not None:
            self.partition.counts.ask(self.log.user, lambda count: self._guard(self._counted, count))

    def _counted(self, count: Unread | None) -> None:
        session, tables = self._session, self._context.tables
        if session.ended or self.log is None:
            return
        self._count.read(self.log.counted(count))
        if self._start is None and tables is not None:
            tables.device_cursor(session.tenant, session.user, session.device, self._begin)
        else:
            self._begin(self._start)

    def _begin(self, start: Start | NotRead) -> None:
        """Say hello with the client's cursor, or with the one that the device is known to have acknowledged."""
        if self._session.ended:
            return
        if self._start is ResetReason.SNAPSHOT:
            start = self._start  # asked for meanwhile, perhaps
        if start is NotRead.TOO_MANY:
            self._end_overloaded()
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

    def unread(self, frame: bytes) -> None:
        """A new unread count for the user."""
        self._count.tell(frame)

    def now(self, frame: bytes) -> None:
        """A message that is never stored: the client gets it now or not at all."""
        if not self.takes_now:
            return
        if not self._count.begun:
            _NOW_EARLY.inc()
        elif not self._outlet.room():
            _NOW_NO_ROOM.inc()
        else:
            self._outlet.send(frame)
            _NOW_SENT.inc()

    def watch(self, state: LogState) -> None:
        """The leader said how its stream stands."""
        self._guard(self.feed.watch, state)

    def check(self) -> None:
        """Something may have been lost."""
        self._guard(self.feed.check)

    def rehydrate(self) -> None:
        """Begin anew with a snapshot; a session that has not begun yet begins with it."""
        self._start = ResetReason.SNAPSHOT
        self._guard(self.feed.rehydrate)

    def writable(self) -> None:
        """The socket has room again."""
        self._count.tell_waiting()
        self._guard(self.feed.writable)

    def close(self) -> None:
        """The session is over. Feed and follower refer to each other: parted, they go without the garbage collector."""
        self.tell_receipts()
        if self.traces is not None:
            self.traces.close()
        self.feed.close()
        self.feed = _CLOSED
        if self.log is not None:
            self.partition.leave(self, self.log)

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
            self._context.receipts.note(self)
        if self.traces is not None:
            self.traces.delivered(seq, message, self.epoch)
        return True

    def resumed(self, cursor: Cursor) -> None:
        """Frame `ready`."""
        self._adopt(cursor, "resumed")
        self._count.begun = True
        ready = Ready(self._session.id, resumed=True, cursor=str(cursor), seq=cursor.seq, unread=self._count.take())
        self._outlet.send(encode(ready), self._epoch_bytes, cursor.seq)
        self._send_what_waited()
        _RESUMED.inc()

    def caught_up(self, cursor: Cursor) -> None:
        """Frame `live`."""
        outlet = self._outlet
        outlet.send(encode(LiveFrame(str(cursor), cursor.seq)), self._epoch_bytes, cursor.seq)
        if outlet.tells_live:
            self._moved(cursor.seq)
        if self.traces is not None:
            self.traces.caught_up()

    def reset(self, reason: ResetReason, snapshot: Snapshot, cursor: Cursor) -> None:
        """Frame `reset`, after `ready` where none was sent yet."""
        self.tell_receipts()
        self._adopt(cursor, reason.value)
        count = self._count.take()
        unread = snapshot.unread if snapshot.unread is not None else count
        self._count.replace(unread)
        if not self._count.begun:
            self._count.begun = True
            self._outlet.send(encode(Ready(self._session.id, reason=reason.value, unread=unread)))
        frame = ResetFrame(reason.value, str(cursor), cursor.seq, unread, list(snapshot.inbox), snapshot.stale)
        self._outlet.send(encode(frame), self._epoch_bytes, cursor.seq)
        self._send_what_waited()
        _JOINED[reason].inc()

    def pong(self) -> None:
        """Frame `pong`, whose cursor moves the client's; if there is no position yet, it follows the first one."""
        cursor = self.feed.advance()
        if cursor is None:
            self._pong_owed = True
        else:
            self._moved(cursor.seq)
            self._outlet.send(encode(Pong(str(cursor), cursor.seq)))

    def _send_what_waited(self) -> None:
        """Answer pings that came before there was a position, and send a count that had to wait for `ready`."""
        if self._pong_owed:
            self._pong_owed = False
            self._outlet.send(encode(Pong(f"{self.epoch}.{self.sent}", self.sent)))
        self._count.tell_waiting()

    def _adopt(self, cursor: Cursor, outcome: str) -> None:
        if self.traces is not None:
            self.traces.adopted(outcome)
        if self.epoch and self.log is not None:
            self.log.forget_count()  # the log may have gone back, or be another
        if cursor.epoch != self.epoch:
            self.former_epoch, self.epoch = self.epoch, cursor.epoch
            self._epoch_bytes, self.ack_opening = epoch_in_frames(cursor.epoch)
            self.sent_before_reset = 0
        else:
            self.sent_before_reset = max(self.sent_before_reset, self.sent_max)
        self.sent_max = 0
        self.tally = Tally(cursor.seq)
        self._moved(cursor.seq)

    def _moved(self, seq: int) -> None:
        self.sent = seq
        self.sent_max = max(self.sent_max, seq)

    # --- receipts ---------------------------------------------------------------------------------------------------

    def take_receipts(self) -> list[Outgoing]:
        """What was sent and acknowledged since the last time."""
        if not self.epoch:
            return []
        session = self._session
        return self.tally.take(
            self.partition.number, session.tenant, session.user, session.device, self.epoch, self.traces
        )

    def tell_receipts(self) -> None:
        """Hand over what there is to tell, before the epoch or the session changes."""
        self._context.receipts.add(self.take_receipts())

    # --- Port: questions --------------------------------------------------------------------------------------------

    def want_head(self, generation: int, ask: Ask) -> None:
        """The newest record of the user."""
        if ask is Ask.LEADER:
            self.partition.watch.ask(self._or_failed(generation, ask, lambda state: self._want_last(generation, state)))
            return
        heads = self.partition.heads
        read = heads.opening if ask is Ask.OPENING else heads.check
        read(self._subject, _TakeHead(self, generation, ask))

    def take_head(self, generation: int, ask: Ask, head: Head | None) -> None:
        """The answer of `heads`."""
        if head is None:
            self._guard(self.feed.failed, generation, ask)
        else:
            self._guard(self.feed.head, generation, ask, *head)

    def _want_last(self, generation: int, state: LogState) -> None:
        def answer(seq: int) -> None:
            self.feed.head(generation, Ask.LEADER, seq, state.last_seq, state)

        self.partition.reader.last(self._subject, self._or_failed(generation, Ask.LEADER, answer))

    def want_page(self, generation: int, seq: int) -> None:
        """Records from `seq` on."""
        self.partition.reader.page(
            self._subject, seq, self._or_failed(generation, Ask.PAGE, lambda page: self.feed.page(generation, *page))
        )

    def want_next(self, generation: int, seq: int) -> None:
        """The leader's first record at or after `seq`."""

        def answer(page: Page) -> None:
            self.feed.next(generation, page.messages[0] if page.messages else None)

        self.partition.reader.next(self._subject, seq, self._or_failed(generation, Ask.NEXT, answer))

    def want_state(self, generation: int) -> None:
        """The leader's state."""
        self.partition.watch.ask(
            self._or_failed(generation, Ask.STATE, lambda state: self.feed.leader(generation, state))
        )

    def want_snapshot(self, generation: int, reason: ResetReason) -> None:
        """The user's snapshot from the projections."""

        def answer(snapshot: Snapshot | None) -> None:
            if snapshot is None:
                self._end_overloaded()
            else:
                self._guard(self.feed.snapshot, generation, snapshot)

        session, context = self._session, self._context
        read_snapshot(self.partition.counts, context.tables, session.tenant, session.user, answer)

    def later(self, generation: int, delay_seconds: float, ask: Ask) -> None:
        """A timer."""
        self._context.wheel.later(delay_seconds, self._timer, generation, ask)

    def _timer(self, generation: int, ask: Ask) -> None:
        self._guard(self.feed.timer, generation, ask)

    def _or_failed(self, generation: int, ask: Ask, act: Callable[[_Answer], None]) -> Callable[[_Answer | None], None]:
        """A callback for an answer: it calls `act`, or tells the feed that the question failed if there is no answer."""

        def take(answer: _Answer | None) -> None:
            if answer is None:
                self._guard(self.feed.failed, generation, ask)
            else:
                self._guard(act, answer)

        return take

    def _end_overloaded(self) -> None:
        """Close, as too many sessions wait for a snapshot: the client comes back, instead of taking its inbox for empty."""
        self._session.end(OVERLOADED, "too many sessions wait for the inbox: come back")

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


class _TakeHead:
    """Hands the answer about a head to its follower.

    All sessions compare heads at the same time, and each waits with one of these. It has 56 bytes; two closures would have 720.
    """

    __slots__ = ("_ask", "_follower", "_generation")

    def __init__(self, follower: Follower, generation: int, ask: Ask) -> None:
        self._follower = follower
        self._generation = generation
        self._ask = ask

    def __call__(self, head: Head | None) -> None:
        self._follower.take_head(self._generation, self._ask, head)


_CLOSED: Final = Feed(cast("Port", None), FeedCounters())
"""Takes late answers to requests of a follower that is over: of a generation that no request has."""
_CLOSED.close()
_CLOSED.generation = -1
