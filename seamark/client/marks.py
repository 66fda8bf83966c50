"""Read marks that the log does not show yet. Pure: no I/O, no clock.

A frame written into a dying socket is not stored, and nobody says so. So a mark stays here until a record of the log says
the same, whoever wrote that record. Every session that has caught up without showing it says it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from seamark.protocol.cursor import Cursor, parse_cursor

READ_IDS_MAX: Final = 200
"""Ids in one `read` frame: 200 ids of 128 bytes stay well below the 64 KiB a gateway accepts in a frame."""

READ_IDS_WAITING_MAX: Final = 1000
"""Marked ids that may wait for the log to show them: five frames."""

_ID: Final = re.compile(r"[!-~]{1,128}")
"""What the id of a record looks like. The gateway would close the session for any other."""

MISSES_MAX: Final = 5
"""How often a mark is said on a session that stands. If the log never shows it, the mark is given up."""


@dataclass(slots=True)
class _Mark:
    due: bool = True
    refused: bool = False
    ticks: int = 0
    misses: int = 0

    def say(self) -> None:
        """It is said now."""
        self.due, self.refused, self.ticks = False, False, 0

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


def check_id(id: object) -> None:
    """Check that `id` can be the id of a record.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(id, str) or _ID.fullmatch(id) is None:
        raise ValueError(f"{id!r} is no id of a record: an id has 1 to 128 printable ASCII characters without blanks")


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
        self.up_to: Cursor | None = None
        self._up_to_mark = _Mark()

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

    def reach(self, cursor: Cursor) -> None:
        """Everything up to `cursor` is read."""
        held = self.up_to
        if held is None or held.epoch != cursor.epoch or held.seq < cursor.seq:
            self.up_to, self._up_to_mark = cursor, _Mark()

    def take(self, position: Cursor | None) -> list[dict[str, Any]]:
        """The `read` frames to send now, on a session that has received everything up to `position`.

        A mark beyond `position` would be a bad frame there, so it waits.
        """
        frames: list[dict[str, Any]] = []
        up_to = self.up_to
        sent = (
            up_to is not None and position is not None and up_to.epoch == position.epoch and up_to.seq <= position.seq
        )
        if sent and self._up_to_mark.due:
            frames.append({"up_to": str(up_to)})
            self._up_to_mark.say()
        due = [id for id, mark in self.ids.items() if mark.due]
        frames += [{"ids": due[start : start + READ_IDS_MAX]} for start in range(0, len(due), READ_IDS_MAX)]
        for id in due:
            self.ids[id].say()
        return frames

    def again(self) -> None:
        """A new session has caught up. The marks it has not shown were not stored, so all are due again."""
        for mark in self._all():
            mark.due = True

    def refused(self) -> None:
        """The gateway could not store something, it does not say what: it is said again after a while.

        That is no miss, however many of the frames were refused.
        """
        for mark in self._all():
            if not mark.due:
                mark.refused, mark.ticks = True, 1

    def tick(self) -> Lost | None:
        """Time has passed: marks that were said long ago are due again, or given up."""
        ids = [id for id, mark in self.ids.items() if mark.tick()]
        for id in ids:
            del self.ids[id]
        up_to = None
        if self.up_to is not None and self._up_to_mark.tick():
            up_to, self.up_to = str(self.up_to), None
        return Lost(ids, up_to) if ids or up_to else None

    def shown(self, cursor: str, record: bytes) -> None:
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
        if self.up_to is not None and read.up_to is not None:
            reached = Cursor(parse_cursor(cursor).epoch, read.up_to)
            if self.up_to.epoch == reached.epoch and self.up_to.seq <= reached.seq:
                self.up_to = None

    def foreign(self, position: Cursor | None) -> Lost | None:
        """Forget a position of another incarnation of the log than `position`'s."""
        up_to = self.up_to
        if up_to is None or (position is not None and up_to.epoch == position.epoch):
            return None
        self.up_to = None
        return Lost(up_to=str(up_to))

    def reset(self, reason: str, position: Cursor | None, inbox: Sequence[dict[str, Any]]) -> Lost | None:
        """A snapshot came. It may show what was marked, and positions from before it may mean nothing any more."""
        for row in inbox:
            if row.get("read"):
                self.ids.pop(str(row.get("id")), None)
        # A log that was put back will give the same numbers to other records.
        return self.foreign(None if reason == "future" else position)
