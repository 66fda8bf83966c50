"""What a connection yields: records of the log, and what happens beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from seamark.protocol.frames import Unread


class State(Enum):
    """Where a connection is."""

    NEW = "new"
    CONNECTING = "connecting"
    CATCHING_UP = "catching up"
    LIVE = "live"
    WAITING = "waiting"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class Record:
    """One entry of the user's log.

    Attributes:
        seq: its sequence in the log's stream.
        prev: the sequence of the position before it; nothing of this log lies between.
        cursor: where the device stands after this record; opaque, store it whole.
        raw: the record's JSON bytes, as stored.
    """

    seq: int
    prev: int
    cursor: str
    raw: bytes
    _ack: Callable[[], None] | None = field(default=None, repr=False)
    _body: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def record(self) -> dict[str, Any]:
        """The record as a dictionary, decoded on first use."""
        if self._body is None:
            self._body = msgspec.json.decode(self.raw, type=dict[str, Any])
        return self._body

    @property
    def id(self) -> str:
        """The record's id; for a notification the id of its event."""
        return str(self.record.get("id", ""))

    @property
    def kind(self) -> str:
        """`notification`, `read`, `archive`, `recall`, or one that a newer version added."""
        return str(self.record.get("kind", ""))

    @property
    def type(self) -> str:
        """The event's type, for example `demo.hello`; empty for records that no event caused."""
        return str(self.record.get("type") or "")

    @property
    def data(self) -> Any:
        """The event's payload."""
        return self.record.get("data")

    @property
    def trace(self) -> str | None:
        """The W3C trace context (`traceparent`) of what caused the record; None: it has none."""
        found = self.record.get("trace")
        return found if isinstance(found, str) else None

    def bind(self, ack: Callable[[], None]) -> None:
        """Say what `ack()` does; the connection that yields the record calls this."""
        self._ack = ack

    def ack(self) -> None:
        """This record and all before it are handled: they may be stored and acknowledged. Twice is harmless."""
        if self._ack is not None:
            self._ack()


@dataclass(frozen=True, slots=True)
class Reset:
    """Replace what the app holds by this snapshot: it was asked for, or the log could not be continued from the cursor.

    Attributes:
        reason: `snapshot` (asked for), `new`, `epoch`, `future` or `trimmed`.
        cursor, seq: where the snapshot stands; the records that follow go on from there.
        unread: the count at the snapshot, None if the gateway has none.
        inbox: the snapshot's rows, newest as the gateway orders them; empty if it has none.
        stale: the snapshot may be older than the oldest kept record.
    """

    reason: str
    cursor: str
    seq: int
    unread: int | None
    inbox: list[dict[str, Any]]
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Live:
    """Every record stored up to `cursor` has been yielded."""

    cursor: str
    seq: int


@dataclass(frozen=True, slots=True)
class Now:
    """A message that is never stored (`at_most_once`, a broadcast): typing, presence. It is in no log and moves no cursor."""

    type: str
    data: Any
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """The gateway could not do what was asked, for example store a read mark; the session goes on (or its end says why).

    Attributes:
        code: a stable word, such as `unavailable` or `too_many_reads`; `mark_lost`: read marks were given up.
        detail: for people.
        ids, up_to: which marks were given up.
    """

    code: str
    detail: str
    ids: Sequence[str] = ()
    up_to: str | None = None


Place = Record | Reset | Live
"""What stands at a position of the log."""

Item = Record | Reset | Live | Unread | Now | Problem
