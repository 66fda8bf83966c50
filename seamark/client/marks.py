"""Read marks that the log does not show yet. Pure: no I/O, no clock.

A frame written into a dying socket is not stored, and nobody says so. So a mark stays here until a record of the log says
the same, whoever wrote that record. Every session that has caught up without showing it says it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from seamark.client.receiver import Position
from seamark.protocol.frames import Read

READ_IDS_MAX: Final = 200
"""Ids in one `read` frame: 200 ids of 128 bytes stay well below the 64 KiB a gateway accepts in a frame."""

READ_IDS_WAITING_MAX: Final = 1000
"""Marked ids that may wait for the log to show them: five frames."""

_ANOTHER_LOG: Final = frozenset({"epoch", "future"})
"""Reasons of a `reset` after which records have other positions than before."""

MISSES_MAX: Final = 5
"""How often a mark is said on a session that stands. If the log never shows it, the mark is given up."""


@dataclass(slots=True)
class _Mark:
    due: bool = True
    refused: bool = False
    ticks: int = 0
    misses: int = 0
    request: str = ""
    """The `id` of the frame that said it last."""

    def say(self, request: str) -> None:
        """It is said now."""
        self.due, self.refused, self.ticks, self.request = False, False, 0, request

    def tick(self) -> bool:
        """Time has passed. True when the mark is to be given up. The first tick may follow right after the mark was said."""
        if self.due:
            return False
        self.ticks += 1
        if self.ticks < 2:
            return False
        self.due = True
        if self.refused:
            return False
        self.misses += 1
        return self.misses >= MISSES_MAX


class Lost(NamedTuple):
    """Marks that were given up."""

    ids: Sequence[str] = ()
    up_to: str | None = None


class _ReadRecord(msgspec.Struct):
    """The fields of a record that say what was read."""

    kind: str = ""
    ids: list[str] = []
    up_to: int | None = None


_decode = msgspec.json.Decoder(_ReadRecord).decode


class Marks:
    """The marks of one user: ids, and one position, since only the highest counts."""

    def __init__(self) -> None:
        self.ids: dict[str, _Mark] = {}
        self.up_to: Position | None = None
        self._up_to_mark = _Mark()
        self._requests = 0

    def __len__(self) -> int:
        return len(self.ids) + (self.up_to is not None)

    def _all(self) -> Iterator[_Mark]:
        yield from self.ids.values()
        if self.up_to is not None:
            yield self._up_to_mark

    @property
    def unsaid(self) -> int:
        """How many marks wait to be said."""
        return sum(mark.due for mark in self._all())

    def add(self, ids: Sequence[str]) -> None:
        """These ids are read."""
        for id in ids:
            self.ids.setdefault(id, _Mark())

    def reach(self, position: Position) -> None:
        """Everything up to `position` is read."""
        if self.up_to is None or self.up_to.seq < position.seq:
            self.up_to, self._up_to_mark = position, _Mark()

    def take(self, position: Position | None) -> list[Read]:
        """The frames to send now, on a session that has received everything up to `position`.

        A mark beyond `position` would be a bad frame there, so it waits.
        """
        frames: list[Read] = []
        up_to = self.up_to
        if up_to is not None and position is not None and up_to.seq <= position.seq and self._up_to_mark.due:
            frames.append(Read(id=self._request([self._up_to_mark]), up_to=up_to.cursor))
        due = [(id, mark) for id, mark in self.ids.items() if mark.due]
        for start in range(0, len(due), READ_IDS_MAX):
            part = due[start : start + READ_IDS_MAX]
            frames.append(Read(id=self._request(mark for _, mark in part), ids=[id for id, _ in part]))
        return frames

    def _request(self, marks: Iterable[_Mark]) -> str:
        """The `id` of a frame that says these marks."""
        self._requests += 1
        request = f"read-{self._requests}"
        for mark in marks:
            mark.say(request)
        return request

    def again(self) -> None:
        """A new session has caught up. The marks it has not shown were not stored, so all are due again."""
        for mark in self._all():
            mark.due = True

    def refused(self, request: str | None) -> None:
        """The gateway could not store what this frame said, so it is said again after a while. That is no miss."""
        for mark in self._all():
            if not mark.due and mark.request == request:
                mark.refused, mark.ticks = True, 1

    def stale(self, request: str | None) -> Lost | None:
        """This frame named a position of a log that is no more: it is given up."""
        return self._forget_position() if self._up_to_mark.request == request else None

    def tick(self) -> Lost | None:
        """Time has passed: marks that were said long ago are due again, or given up."""
        ids = [id for id, mark in self.ids.items() if mark.tick()]
        for id in ids:
            del self.ids[id]
        lost = self._forget_position() if self.up_to is not None and self._up_to_mark.tick() else None
        return Lost(ids, lost and lost.up_to) if ids or lost else None

    def shown(self, record: bytes) -> None:
        """The log shows a record: the marks that it states are done."""
        if not self:
            return
        try:
            read = _decode(record)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if read.kind != "read":
            return
        for id in read.ids:
            self.ids.pop(id, None)
        if self.up_to is not None and read.up_to is not None and self.up_to.seq <= read.up_to:
            self.up_to = None

    def reset(self, reason: str, inbox: Sequence[dict[str, Any]]) -> Lost | None:
        """A snapshot came. It may show what was marked, and positions of another log mean nothing any more."""
        for row in inbox:
            if row.get("read"):
                self.ids.pop(str(row.get("id")), None)
        return self._forget_position() if reason in _ANOTHER_LOG else None

    def _forget_position(self) -> Lost | None:
        up_to, self.up_to = self.up_to, None
        return None if up_to is None else Lost(up_to=up_to.cursor)
