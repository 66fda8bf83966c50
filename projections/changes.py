"""What a record changes: the part of it that every fold of a log reads, so that all of them take the same for a record."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final

import msgspec

from engine.limits import EVENT_ID_BYTES_MAX, LABEL_CHARS_MAX

Id = Annotated[str, msgspec.Meta(max_length=EVENT_ID_BYTES_MAX)]
Label = Annotated[str, msgspec.Meta(max_length=LABEL_CHARS_MAX)]
"""What a table has an index on: one entry too long for it would stop the whole partition."""

NEVER_SHOWN: Final = b"\r\nSeamark-Skip:"
"""Stands in the headers of a notification that is not for the screen."""


class Change(msgspec.Struct, gc=False, omit_defaults=True):
    """What of a record concerns counts and lists. What is no `Change` is no record, and changes no projection."""

    id: Id
    kind: str
    category: str | None = None
    collapse_key: Label | None = None
    expires_at: datetime | None = None
    ids: list[str] = []
    up_to: int | None = None


decode_change = msgspec.json.Decoder(Change).decode


def clean(text: str) -> str:
    """Text as PostgreSQL takes it: it knows no NUL. Every fold reads it so, or two of them would tell other ids apart."""
    return text.replace("\0", "�") if "\0" in text else text
