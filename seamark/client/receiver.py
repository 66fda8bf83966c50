"""The client's receive rules as a pure object: each frame in, one outcome out. No I/O, no clock.

One position is held: the last cursor the gateway sent that was accepted. The `prev` of the next record must equal its
sequence, which proves that no frame was lost between gateway and client; a record at or below it is a duplicate. The
position moves before the app sees the record, so that a connection replaced meanwhile resumes behind what is already
queued here. What is *stored* is decided elsewhere (`keeper.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from seamark.client.frames import (
    Bye,
    ErrorFrame,
    Frame,
    LiveFrame,
    NowFrame,
    Pong,
    Ready,
    RecordFrame,
    ResetFrame,
    Skip,
    UnreadFrame,
)
from seamark.protocol.cursor import START, Cursor, parse_cursor
from seamark.protocol.errors import InvalidCursor


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand `frame` to the app: it is the next record of the log."""

    frame: RecordFrame


@dataclass(frozen=True, slots=True)
class Advance:
    """Nothing for the app, but the log is known up to `cursor`; `live` when it is caught up."""

    cursor: str
    live: bool = False


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing to do; `why` is for counting."""

    why: str


@dataclass(frozen=True, slots=True)
class Restart:
    """The chain is broken or the peer is wrong: end this connection and resume from the position held."""

    why: str


@dataclass(frozen=True, slots=True)
class Restore:
    """The app must replace its state by the snapshot in `frame`; the log goes on after it."""

    frame: ResetFrame


@dataclass(frozen=True, slots=True)
class Joined:
    """The session stands; records (or a reset) follow."""

    frame: Ready


@dataclass(frozen=True, slots=True)
class Notice:
    """Something beside the log: unread count, error, bye, an unstored event."""

    frame: UnreadFrame | ErrorFrame | Bye | NowFrame


Outcome = Deliver | Advance | Drop | Restart | Restore | Joined | Notice


class Receiver:
    """Decides on every frame of one device, over all its sessions.

    Args:
        cursor: where to go on from, or "start" for the oldest kept record; None leaves it to what the gateway knows of
            the device.

    Raises:
        InvalidCursor: `cursor` is not one a gateway could have sent.
    """

    def __init__(self, cursor: str | None = None) -> None:
        self._start = cursor == START
        self.position = None if cursor is None or self._start else parse_cursor(cursor)
        self._joined = False
        self._anchored = False

    @property
    def resume_cursor(self) -> str | None:
        """What the next `hello` carries."""
        if self.position is not None:
            return str(self.position)
        return START if self._start else None

    def connected(self) -> None:
        """A new session begins: nothing was sent on it yet."""
        self._joined = False
        self._anchored = False

    def on(self, frame: Frame) -> Outcome:
        """What `frame` asks for. After `Restart` the session is over; only `connected()` may follow."""
        if isinstance(frame, UnreadFrame | ErrorFrame | Bye | NowFrame):
            return Notice(frame)
        try:
            return self._on_log(frame)
        except InvalidCursor as invalid:
            return Restart(f"bad cursor in frame: {invalid}")

    def _on_log(self, frame: Ready | RecordFrame | Skip | LiveFrame | Pong | ResetFrame) -> Outcome:
        if isinstance(frame, Ready):
            return self._on_ready(frame)
        if not self._joined:
            return Restart("a frame of the log came before `ready`")
        if isinstance(frame, ResetFrame):
            # Straight adoption: another epoch, a trimmed past or a lower sequence are all possible here.
            self.position = parse_cursor(frame.cursor)
            self._anchored = True
            return Restore(frame)
        if isinstance(frame, Pong) and (frame.cursor is None or not self._anchored):
            return Drop("pong")
        if not self._anchored or self.position is None:
            return Restart("the log went on before the reset that `ready` announced")
        if isinstance(frame, LiveFrame | Pong):
            return self._on_position(frame, self.position)
        return self._on_record(frame, self.position)

    def _on_ready(self, frame: Ready) -> Outcome:
        if self._joined:
            return Restart("a second `ready` in one session")
        if frame.resumed:
            if frame.cursor is None:
                return Restart("`ready` says resumed but has no cursor")
            accepted = parse_cursor(frame.cursor)
            if self.position is not None and accepted != self.position:
                # Going on from elsewhere would skip or repeat in silence; the gateway must say `reset` for that.
                return Restart("the gateway resumed from a cursor that was not asked for")
            self.position = accepted
            self._anchored = True
        self._joined = True
        return Joined(frame)

    def _on_position(self, frame: LiveFrame | Pong, held: Cursor) -> Outcome:
        assert frame.cursor is not None
        cursor = parse_cursor(frame.cursor)
        live = isinstance(frame, LiveFrame)
        if cursor.epoch != held.epoch:
            return Restart("the epoch changed without a reset")
        if cursor.seq < held.seq:
            return Restart("`live` lies behind what was sent") if live else Drop("pong")
        self.position = cursor
        return Advance(frame.cursor, live)

    def _on_record(self, frame: RecordFrame | Skip, held: Cursor) -> Outcome:
        cursor = parse_cursor(frame.cursor)
        if cursor.epoch != held.epoch:
            return Restart("the epoch changed without a reset")
        if cursor.seq != frame.seq:
            return Restart("cursor and sequence of a record differ")
        if frame.seq <= held.seq:
            return Drop("duplicate")
        if frame.prev != held.seq:
            return Restart(f"record {frame.seq} follows {frame.prev}, but {held.seq} is held")
        self.position = cursor
        return Deliver(frame) if isinstance(frame, RecordFrame) else Advance(frame.cursor)
