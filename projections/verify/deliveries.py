"""Verifies what is known of deliveries: every row of its tables against the fold of its user's receipts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from engine.broker.jetstream import Broker
from engine.partition.reader import Delivered
from projections.deliveries.table import DELIVERIES, EARLIEST, GATEWAY_CLOCK_SLACK
from projections.folds.deliveries import Delivery, Receipts, fold
from projections.postgres.patience import patiently
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
from seamark.protocol.subjects import RECEIPTS_STREAM

if TYPE_CHECKING:
    from projections.postgres.versions import Pool


class _Table(NamedTuple):
    key: tuple[str, ...]
    facts: tuple[str, ...]


_TABLES: Final = {
    "deliveries": _Table(("tenant", "user_id", "id", "channel", "device"), tuple(f.name for f in fields(Delivery))),
    "delivery_ranges": _Table(
        ("tenant", "user_id", "epoch", "up_to", "after_seq", "device", "channel", "state"), ("at", "sent_at")
    ),
    "device_cursors": _Table(("tenant", "user_id", "device"), ("epoch", "seq", "at")),
}

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[Any]).decode


class DeliveriesVerification(StreamVerification):
    """Of the tables `deliveries`, `delivery_ranges` and `device_cursors`."""

    projection = DELIVERIES
    kind = "rcpt"

    def __init__(self, broker: Broker, pool: Pool, partitions: int, progress: Progress | None = None) -> None:
        super().__init__(broker, partitions, progress)
        self._pool = pool
        self._horizon: datetime | None = None

    def _stream(self, p: int) -> str:
        return RECEIPTS_STREAM

    async def _checkpoint(self, p: int) -> Checkpoint | None:
        async with asking(self._pool, LOOK_SECONDS) as connection:
            found = await checkpoint_of(connection, DELIVERIES, RECEIPTS_STREAM, p)
        return None if found is None else found[0]

    async def _find_horizon(self) -> None:
        """Find the time before which rows cannot be recomputed; None: the stream still holds every receipt there ever was."""
        oldest = await self._broker.leader_next(RECEIPTS_STREAM, "rcpt.>", 1)
        if oldest is None:
            self._horizon = datetime.max.replace(tzinfo=UTC)
        else:
            # A row that is hardly younger than the oldest receipt may have lost its first one.
            self._horizon = datetime.fromisoformat(oldest.time) + GATEWAY_CLOCK_SLACK if oldest.seq > 1 else None

    def _light(self, stored: Delivered) -> bytes | None:
        return _pack((stored.subject, stored.seq, stored.time_nanoseconds, stored.payload))

    async def _read_stored(self, spill: Spill) -> None:
        await patiently(self._find_horizon)
        for table in _TABLES:
            async for rows in Tables(self._pool, DELIVERIES, self._progress).rows(table, _columns(table)):
                for row in rows:
                    spill.stored(tokens_of(row["tenant"], row["user_id"]), _pack((table, *row)))

    def _judge(self, user: str, part: Part, said: Sequence[bytes], stored: Sequence[bytes]) -> Judgement:
        folded = fold(Delivered(row[0], row[1], row[2], b"", row[3]) for row in map(_unpack, said))
        expected = _expected(folded)
        differences: list[Difference] = []
        compared = older = 0
        seen: set[tuple[Any, ...]] = set()
        for table, earliest, *values in map(_unpack, stored):
            key, facts = _TABLES[table]
            mine = (table, *values[: len(key)])
            if mine in seen:
                differences.append(Difference(f"{table} row stands twice", _words(mine[1:])))
                continue
            seen.add(mine)
            wanted = expected.pop(mine, None)
            if self._horizon is not None and earliest < self._horizon:
                older += 1
                continue
            compared += 1
            differences += _differences(table, mine[1:], dict(zip(facts, values[len(key) :], strict=True)), wanted)
        differences += [Difference(f"{table} row is missing", _words(key)) for table, *key in expected]
        return Judgement(differences, compared, older)

    async def _look(self, user: str) -> Judgement:
        part = self._parts[self.partition(user)]
        await self._find_horizon()
        stored: list[bytes] = []
        async with one_view(self._pool) as connection:
            at = await checkpoint_of(connection, DELIVERIES, RECEIPTS_STREAM, part.number)
            for table in _TABLES:
                rows = await connection.fetch(
                    f"SELECT {_columns(table)} FROM {table}"
                    f" WHERE version = {LIVE.format(DELIVERIES)} AND tenant = $1 AND user_id = $2",
                    *names_of(user),
                )
                stored += [_pack((table, *row)) for row in rows]
        if at is None:
            return Judgement([], 0)
        await self._check_epoch(RECEIPTS_STREAM, at[0])
        return self._judge(user, part, await self._said(user, part, at[0].seq), stored)


def _columns(table: str) -> str:
    return ", ".join((f"{EARLIEST[table]} AS earliest", *_TABLES[table].key, *_TABLES[table].facts))


def _expected(folded: Receipts) -> dict[tuple[Any, ...], dict[str, Any]]:
    names = _TABLES["deliveries"].facts
    return (
        {("deliveries", *key): {name: getattr(one, name) for name in names} for key, one in folded.deliveries.items()}
        | {("delivery_ranges", *one[:8]): {"at": one[8], "sent_at": one[9]} for one in folded.ranges.values()}
        | {
            ("device_cursors", *key): {"epoch": one.epoch, "seq": one.seq, "at": one.at}
            for key, one in folded.cursors.items()
        }
    )


def _differences(
    table: str, key: tuple[Any, ...], stored: dict[str, Any], wanted: dict[str, Any] | None
) -> list[Difference]:
    if wanted is None:
        return [Difference(f"{table} row that no receipt gives", _words(key))]
    return [
        Difference(table, _words(key), name, stored[name], value)
        for name, value in wanted.items()
        if stored[name] != value
    ]


def _words(key: Sequence[Any]) -> list[str]:
    return [str(part) for part in key]
