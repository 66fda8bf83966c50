"""What a record changes: the part of it that every fold of a log reads, so that all folds agree on what is a record."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

from seamark.protocol.events import EventId, Label

NEVER_SHOWN: Final = b"\r\nSeamark-Skip:"
"""In the headers of a notification that is not shown on a screen."""


class Change(msgspec.Struct, gc=False, omit_defaults=True):
    """The part of a record that counts and lists depend on. What is no `Change` is no record, and changes no projection."""

    id: EventId  # bounded, as an index of a table holds it: an entry too long for that would stop the whole partition
    kind: str
    category: str | None = None
    collapse_key: Label | None = None
    expires_at: datetime | None = None
    ids: list[str] = []
    up_to: int | None = None


NO_RECORD: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises where bytes are no record, or no receipt."""

decode_change = msgspec.json.Decoder(Change).decode


def clean(text: str) -> str:
    """The text without NUL, which PostgreSQL cannot store. Every fold does this, so that all of them see the same ids."""
    return text.replace("\0", "�") if "\0" in text else text
