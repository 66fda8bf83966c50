"""Where a session begins in its log, as its client has said."""

from __future__ import annotations

from typing import Final, Literal

from gateway.join.port import ResetReason
from seamark.protocol.cursor import START, Cursor, parse_cursor
from seamark.protocol.errors import InvalidCursor

Start = Cursor | Literal["start", ResetReason.SNAPSHOT] | None
"""At a cursor, at the oldest record, with a snapshot, or where the device is known to stand."""

NO_EPOCH: Final = "-"
"""Epoch of a cursor that cannot be read: no stream has it, so the feed answers it with a reset, as any foreign one."""


def start_at(cursor: str | None) -> Start:
    """Where a client wants to begin that has said `cursor`."""
    if cursor is None:
        return None
    if cursor == START:
        return "start"
    try:
        return parse_cursor(cursor)
    except InvalidCursor:
        return Cursor(NO_EPOCH, 0)
