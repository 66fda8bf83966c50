"""The cursor: what a device has reached in a log. Opaque to clients, `<epoch>.<seq>` to us."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from seamark.protocol.errors import InvalidCursor

START: Final = "start"
"""What a client sends to ask for the oldest kept record."""

_FORM = re.compile(r"([a-z0-9]{1,32})\.(0|[1-9][0-9]{0,18})", re.ASCII)


class Cursor(NamedTuple):
    """A position: the incarnation of the stream and a sequence in it. A sequence alone would lie after a re-creation."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}"


def parse_cursor(text: str) -> Cursor:
    """The cursor written as `text`.

    Raises:
        InvalidCursor: `text` is not `<epoch>.<seq>` in the one form `str(cursor)` gives.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidCursor(f'not a cursor: {text[:64]!r}; send back exactly what the gateway sent, or "start"')
    return Cursor(found[1], int(found[2]))
