"""The verification of a projection in PostgreSQL: every row against the fold of its user's messages, and the other way round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Protocol

from engine.broker.jetstream import Broker
from engine.partition.reader import Delivered
from engine.postgres import Pool, asking, one_view
from projections.folds.inbox import User
from projections.postgres.versions import Place, live, read_place
from projections.projection import IN_TABLES, Table
from projections.replay import Progress, no_progress
from projections.verify import deliveries, inbox
from projections.verify.scan import scan
from projections.verify.spill import Spill, Users
from projections.verify.streams import (
    Difference,
    Judgement,
    Key,
    Part,
    Row,
    StreamVerification,
    names_of,
    tokens_of,
)


class Folded(Protocol):
    """What a verification has to know of a projection."""

    def light(self, stored: Delivered) -> Delivered | None:
        """What the fold needs of a message; None: the message is passed over."""

    def is_older(self, row: Row, part: Part) -> bool:
        """Whether the stream no longer holds what the row was folded from."""

    def expected(
        self, user: User, part: Part, said: Sequence[Delivered], older: Sequence[Row]
    ) -> dict[Key, dict[str, Any]]:
        """The rows of a user, as messages that were made light give them."""


FOLDED: Final[dict[str, Folded]] = {"inbox": inbox, "deliveries": deliveries}

DIGESTS: Final = {"record": "sha256(record)"}
"""Columns of which digests are compared: the bytes of a whole log would fill the disk."""


class Verification(StreamVerification):
    """One verification of `inbox` or `deliveries`; iterate over `differences`, then look at `result`."""

    def __init__(
        self, broker: Broker, pool: Pool, projection: str, partitions: int, *, progress: Progress = no_progress
    ) -> None:
        self.projection = IN_TABLES[projection]
        super().__init__(broker, partitions, progress)
        self._folded = FOLDED[projection]
        self._pool = pool

    def _light(self, stored: Delivered) -> Delivered | None:
        return self._folded.light(stored)

    async def _place(self, p: int) -> Place | None:
        async with asking(self._pool) as connection:
            return await read_place(connection, self.projection.name, self.projection.stream(p), p)

    async def _read_stored(self, spill: Spill) -> None:
        for number, table in enumerate(self.projection.tables):
            async for rows in scan(self._pool, self.projection.name, table.name, _columns(table), self._progress):
                for row in rows:
                    spill.stored(tokens_of(row["tenant"], row["user_id"]), (number, *row))

    async def _suspects(self, users: Users) -> list[str]:
        suspects = []
        for user, (said, stored) in users.items():
            part = self._parts.get(self.partition(user))
            if part is None:
                continue
            judgement = self._judge(user, part, [Delivered(*one) for one in said], stored)
            if judgement.differences:
                suspects.append(user)
            else:
                self._counted(judgement)
        return suspects

    async def _look(self, user: str) -> Judgement:
        p, stored = self.partition(user), []
        async with one_view(self._pool) as connection:
            place = await read_place(connection, self.projection.name, self.projection.stream(p), p)
            for number, table in enumerate(self.projection.tables):
                rows = await connection.fetch(
                    f"SELECT {_columns(table)} FROM {table.name}"
                    f" WHERE version = {live(self.projection.name)} AND tenant = $1 AND user_id = $2",
                    *names_of(user),
                )
                stored += [(number, *row) for row in rows]
        if place is None:
            return Judgement([])
        part = await self._part(p, place)
        return self._judge(user, part, await self._said(user, part), stored)

    def _judge(self, user: str, part: Part, said: Sequence[Delivered], stored: Sequence[Sequence[Any]]) -> Judgement:
        """Fold what the stream says of a user, and compare it with what is stored."""
        rows = [self._row(*values) for values in stored]
        older = {row.place: row for row in rows if self._folded.is_older(row, part)}
        expected = self._folded.expected(names_of(user), part, said, list(older.values()))
        places = Counter(row.place for row in rows)
        differences = [_difference(place, "row stands twice") for place, count in places.items() if count > 1]
        compared = 0
        for place, row in {row.place: row for row in rows}.items():
            wanted = expected.pop(place, None)
            if wanted is not None:
                differences += [
                    Difference(place[0], _words(place), name, row.facts[name], value)
                    for name, value in wanted.items()
                    if row.facts[name] != value
                ]
            elif place in older:
                continue
            else:
                differences.append(_difference(place, "row that the stream does not give"))
            compared += 1
        differences += [_difference(place, "row is missing") for place in expected]
        return Judgement(differences, compared, len(older))

    def _row(self, number: int, earliest: Any, *values: Any) -> Row:
        table = self.projection.tables[number]
        width = len(table.key)
        return Row(table, tuple(values[:width]), dict(zip(table.facts, values[width:], strict=True)), earliest)


def _columns(table: Table) -> str:
    return ", ".join((f"{table.earliest} AS earliest", *(DIGESTS.get(name, name) for name in table.columns)))


def _difference(place: Key, what: str) -> Difference:
    return Difference(f"{place[0]} {what}", _words(place))


def _words(place: Key) -> list[str]:
    return [str(part) for part in place[1:]]
