"""The client's receive rules as a pure object: each frame in, one outcome out. No I/O, no clock.

One position is held: that of the last frame accepted. No record of the log is between the `prev` of a record and its `seq`.
So with `prev` at or below the position held nothing was lost, and a record at or below it is a duplicate. The position moves
before the app sees the record, so that a connection replaced meanwhile resumes behind what is already queued here. What is
*stored* is decided elsewhere (`keeper.py`). Cursors are never looked into: what is compared is the number beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from seamark.protocol.frames import (
    Bye,
    ErrorFrame,
    GatewayFrame,
    LiveFrame,
    NowFrame,
    Pong,
    Ready,
    RecordFrame,
    ResetFrame,
    Skip,
    UnreadFrame,
)


class Position(NamedTuple):
    """Where a device is in the log."""

    cursor: str
    """Opaque: what the gateway is told."""
    seq: int
    """What this side compares."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand `frame` to the app: it is the next record of the log."""

    frame: RecordFrame


@dataclass(frozen=True, slots=True)
class Advance:
    """Nothing for the app, but the log is known up to there; `live` when it is caught up."""

    to: Position
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
    """

    def __init__(self, cursor: str | None = None) -> None:
        self.position: Position | None = None
        self._asked = cursor
        self._joined = False
        self._anchored = False

    @property
    def resume_cursor(self) -> str | None:
        """What the next `hello` carries."""
        return self._asked if self.position is None else self.position.cursor

    def connected(self) -> None:
        """A new session begins: nothing was sent on it yet."""
        self._joined = False
        self._anchored = False

    def on(self, frame: GatewayFrame) -> Outcome:
        """What `frame` asks for. After `Restart` the session is over; only `connected()` may follow."""
        if isinstance(frame, UnreadFrame | ErrorFrame | Bye | NowFrame):
            return Notice(frame)
        if isinstance(frame, Ready):
            return self._on_ready(frame)
        if isinstance(frame, RecordFrame | Skip | ResetFrame) and frame.feed is not None:
            return Drop("of another log than the user's")
        if not self._joined:
            return Restart("a frame of the log came before `ready`")
        if isinstance(frame, ResetFrame):
            # Straight adoption: another log, a trimmed past or a lower sequence are all possible here.
            self.position = Position(frame.cursor, frame.seq)
            self._anchored = True
            return Restore(frame)
        if not self._anchored or self.position is None:
            if isinstance(frame, Pong):
                return Drop("pong")
            return Restart("the log went on before the reset that `ready` announced")
        if isinstance(frame, LiveFrame | Pong):
            return self._on_position(frame, self.position)
        return self._on_record(frame, self.position)

    def _on_ready(self, frame: Ready) -> Outcome:
        if self._joined:
            return Restart("a second `ready` in one session")
        if frame.resumed:
            if frame.cursor is None or frame.seq is None:
                return Restart("`ready` says resumed but has no cursor")
            if self.position is not None and frame.seq != self.position.seq:
                # Going on from elsewhere would skip or repeat in silence; the gateway must say `reset` for that.
                return Restart("the gateway resumed from a cursor that was not asked for")
            self.position = Position(frame.cursor, frame.seq)
            self._anchored = True
        self._joined = True
        return Joined(frame)

    def _on_position(self, frame: LiveFrame | Pong, held: Position) -> Outcome:
        live = isinstance(frame, LiveFrame)
        if frame.seq < held.seq:
            return Restart("`live` lies behind what was sent") if live else Drop("pong")
        self.position = Position(frame.cursor, frame.seq)
        return Advance(self.position, live)

    def _on_record(self, frame: RecordFrame | Skip, held: Position) -> Outcome:
        if frame.seq <= held.seq:
            return Drop("duplicate")
        if frame.prev > held.seq:
            return Restart(f"record {frame.seq} follows {frame.prev}, but {held.seq} is held")
        self.position = Position(frame.cursor, frame.seq)
        return Deliver(frame) if isinstance(frame, RecordFrame) else Advance(self.position)
