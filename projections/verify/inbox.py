"""What the inbox of a user must be by the log: what `projections.verify.tables` holds its rows against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.partition.reader import Delivered
from projections.folds.changes import NEVER_SHOWN, NO_RECORD
from projections.folds.inbox import SEQ_MAX, User, decode_entry, fold, withheld_by
from projections.projection import INBOX
from projections.verify.streams import Key, Part, Row

_DIGEST_BYTES = hashlib.sha256().digest_size
_encode = msgspec.json.Encoder().encode


def light(stored: Delivered) -> Delivered | None:
    """A record with, in place of its bytes, their digest and what folds of a log read of them."""
    try:
        entry = decode_entry(stored.payload)
    except NO_RECORD:
        return None
    if entry.up_to is not None:  # the record may have any number, and what is written to disk has 64 bits
        entry.up_to = max(-1, min(entry.up_to, SEQ_MAX))
    if entry.event is not None:
        entry.event.seq = max(0, min(entry.event.seq, SEQ_MAX))
    # A plan tells by which channels, and in each of them much else: a fold asks for their names, and for why all are never sent.
    why = withheld_by(entry.plan)
    entry.plan = dict.fromkeys(entry.plan) if why is None else {"": {"when": "never", "why": why}}
    headers = NEVER_SHOWN if NEVER_SHOWN in stored.headers else b""
    digest = hashlib.sha256(stored.payload).digest()
    return msgspec.structs.replace(stored, headers=headers, payload=digest + _encode(entry))


def record_of(light: Delivered) -> tuple[bytes, bytes]:
    """The digest of a light record, and what folds read of it."""
    return light.payload[:_DIGEST_BYTES], light.payload[_DIGEST_BYTES:]


def is_older(row: Row, part: Part) -> bool:
    """Whether the log no longer holds the notification, be it that its incarnation has gone."""
    return bool(row.facts["era"] < part.place.era or row.facts["seq"] < part.oldest)


def expected(user: User, part: Part, said: Sequence[Delivered], older: Sequence[Row]) -> dict[Key, dict[str, Any]]:
    """The rows of a user, whose `older` ones are known when their ids come again."""
    if any("\0" in name for name in user):
        return {}  # PostgreSQL has no such name
    newest_first = sorted(older, key=lambda row: (row.facts["era"], row.facts["seq"]), reverse=True)
    known = {row.key[2]: newer for newer, row in enumerate(newest_first)}
    entries = []
    for one in said:
        digest, entry = record_of(one)
        entries.append((user, msgspec.structs.replace(one, payload=digest), decode_entry(entry)))
    changes = fold(entries, part.place.checkpoint.epoch, part.place.era, {user: known}).get(user)
    table = INBOX.tables[0]
    rows = changes.rows.values() if changes is not None else ()
    return {(table.name, *user, row.id): {name: getattr(row, name) for name in table.facts} for row in rows}
