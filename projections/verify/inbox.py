"""Verifies the inbox: every row against the fold of its user's log, and the other way round."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.broker.jetstream import Broker
from engine.partition.reader import Delivered
from projections.folds.changes import NEVER_SHOWN
from projections.folds.inbox import SEQ_MAX, Entry, Row, decoded, fold
from projections.inbox.table import INBOX
from projections.postgres.versions import asking
from projections.store import Checkpoint
from projections.verify.spill import Spill
from projections.verify.streams import (
    LIVE,
    LOOK_SECONDS,
    Difference,
    Judgement,
    Part,
    Progress,
    StreamVerification,
    Tables,
    checkpoint_of,
    names_of,
    one_view,
    tokens_of,
)
from seamark.protocol.subjects import log_stream

if TYPE_CHECKING:
    from projections.postgres.versions import Pool

_KEY: Final = ("tenant", "user_id", "id", "era", "seq", "epoch")
_FACTS: Final = tuple(field.name for field in fields(Row) if field.name not in (*_KEY, "record"))
_COLUMNS: Final = ", ".join((*_KEY, "sha256(record)", *_FACTS))


class _Light(msgspec.Struct, array_like=True):
    """A record with a digest in place of its bytes, which for a whole log would fill disk and memory."""

    seq: int
    time_nanoseconds: int
    never_shown: bool
    digest: bytes
    entry: Entry


_pack = msgspec.msgpack.Encoder().encode
_unpack_light = msgspec.msgpack.Decoder(_Light).decode
_unpack_row = msgspec.msgpack.Decoder(list[Any]).decode


class InboxVerification(StreamVerification):
    """Of the table `inbox`."""

    projection = INBOX
    kind = "log"

    def __init__(self, broker: Broker, pool: Pool, partitions: int, progress: Progress | None = None) -> None:
        super().__init__(broker, partitions, progress)
        self._pool = pool
        self._eras: dict[int, int] = {}

    def _stream(self, p: int) -> str:
        return log_stream(p)

    async def _checkpoint(self, p: int) -> Checkpoint | None:
        async with asking(self._pool, LOOK_SECONDS) as connection:
            found = await checkpoint_of(connection, INBOX, log_stream(p), p)
        if found is None:
            return None
        self._eras[p] = found[1]
        return found[0]

    def _light(self, stored: Delivered) -> bytes | None:
        found = decoded([stored])
        if not found:
            return None
        _, _, entry = found[0]
        if entry.up_to is not None:  # the record may have any number, and msgpack has 64 bits
            entry.up_to = max(-1, min(entry.up_to, SEQ_MAX))
        if entry.event is not None:
            entry.event.seq = max(0, min(entry.event.seq, SEQ_MAX))
        entry.plan = dict.fromkeys(entry.plan)
        digest = hashlib.sha256(stored.payload).digest()
        return _pack(_Light(stored.seq, stored.time_nanoseconds, NEVER_SHOWN in stored.headers, digest, entry))

    async def _read_stored(self, spill: Spill) -> None:
        async for rows in Tables(self._pool, INBOX, self._progress).rows("inbox", _COLUMNS):
            for row in rows:
                spill.stored(tokens_of(row["tenant"], row["user_id"]), _pack(tuple(row)))

    def _judge(self, user: str, part: Part, said: Sequence[bytes], stored: Sequence[bytes]) -> Judgement:
        rows = {
            row[2]: row for row in map(_unpack_row, stored) if row[5] == part.epoch or row[3] < self._eras[part.number]
        }
        older = [row for row in rows.values() if row[3] < self._eras[part.number] or row[4] < part.oldest]
        older.sort(key=lambda row: (row[3], row[4]), reverse=True)
        name = names_of(user)
        known = {row[2]: newer for newer, row in enumerate(older)}
        folded = fold(
            ((name, *_entry(item)) for item in said),
            part.epoch,
            self._eras[part.number],
            {name: known},
        )
        changes = folded.get(name)
        expected: dict[str, Row] = dict(changes.rows) if changes is not None else {}
        differences: list[Difference] = []
        if len(rows) < len(stored):
            differences += [Difference("inbox row stands twice", [*name, id]) for id in _twice(stored)]
        compared = 0
        for id, row in rows.items():
            wanted = expected.pop(id, None)
            if wanted is None and id in known:
                continue
            compared += 1
            differences += _differences([*name, id], row, wanted)
        differences += [
            Difference("inbox row is missing", [*name, id], expected=row.seq) for id, row in expected.items()
        ]
        here = sum(1 for row in older if row[5] == part.epoch)
        return Judgement(differences, compared, here)

    async def _look(self, user: str) -> Judgement:
        part = self._parts[self.partition(user)]
        tenant, name = names_of(user)
        async with one_view(self._pool) as connection:
            at = await checkpoint_of(connection, INBOX, part.stream, part.number)
            rows = await connection.fetch(
                f"SELECT {_COLUMNS} FROM inbox WHERE version = {LIVE.format(INBOX)} AND tenant = $1 AND user_id = $2",
                tenant,
                name,
            )
        if at is None:
            return Judgement([], 0)
        checkpoint, self._eras[part.number] = at
        await self._check_epoch(part.stream, checkpoint)
        first = await self._broker.leader_next(part.stream, f"log.{part.number}.>", 1)
        now = part._replace(oldest=first.seq if first is not None else checkpoint.seq + 1)
        said = await self._said(user, part, checkpoint.seq)
        return self._judge(user, now, said, [_pack(tuple(row)) for row in rows])


def _twice(stored: Sequence[bytes]) -> list[str]:
    return [id for id, count in Counter(_unpack_row(item)[2] for item in stored).items() if count > 1]


def _entry(item: bytes) -> tuple[Delivered, Entry]:
    light = _unpack_light(item)
    headers = NEVER_SHOWN if light.never_shown else b""
    return Delivered(b"", light.seq, light.time_nanoseconds, headers, light.digest), light.entry


def _differences(key: list[str], row: list[Any], wanted: Row | None) -> list[Difference]:
    if wanted is None:
        return [Difference("inbox row that the log does not give", key, stored=row[4])]
    found = [
        Difference("inbox", key, name, value, getattr(wanted, name))
        for name, value in zip(("era", "seq"), row[3:5], strict=True)
        if value != getattr(wanted, name)
    ]
    if row[6] != wanted.record:
        found.append(Difference("inbox", key, "record", "other bytes than the log holds"))
    found += [
        Difference("inbox", key, name, value, getattr(wanted, name))
        for name, value in zip(_FACTS, row[7:], strict=True)
        if value != getattr(wanted, name)
    ]
    return found
