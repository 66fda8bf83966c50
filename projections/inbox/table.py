"""The inbox of a partition in PostgreSQL: rows, marks and checkpoint change in one transaction or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from msgspec.structs import astuple

from engine.partition.reader import Delivered
from engine.postgres import Connection, Pool, transposed
from projections.folds.changes import clean
from projections.folds.inbox import Mark, Row, User, UserChanges, decoded, fold
from projections.folds.repeats import REMEMBERED_MAX
from projections.postgres.store import TableStore
from projections.projection import INBOX

_COLUMNS: Final = (*Row.__struct_fields__, "kept_until", "version")

_KNOWN: Final = """
SELECT i.tenant, i.user_id, i.id, (
    SELECT count(*) FROM (
        SELECT FROM inbox_{version} n
        WHERE n.tenant = i.tenant AND n.user_id = i.user_id AND (n.era, n.seq) > (i.era, i.seq) LIMIT {remembered}
    ) newer
) AS since
FROM unnest($1::text[], $2::text[], $3::text[]) AS o (tenant, user_id, id)
JOIN inbox_{version} i ON i.tenant = o.tenant AND i.user_id = o.user_id AND i.id = o.id
"""

_BY_ID: Final = """
UPDATE inbox_{version} i SET {sets}
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::timestamptz[], $6::text[])
    AS o (tenant, user_id, id, seq, at, device)
WHERE i.tenant = o.tenant AND i.user_id = o.user_id AND i.id = o.id
  AND (i.{column} IS NULL OR i.era = $7 AND i.{column} > o.seq)
"""

_BY_RANGE: Final = """
UPDATE inbox_{version} i SET {sets}
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::timestamptz[], $7::text[])
    AS o (tenant, user_id, above, up_to, seq, at, device)
WHERE i.tenant = o.tenant AND i.user_id = o.user_id
  AND (i.era = $8 AND i.seq > o.above AND i.seq <= o.up_to OR i.era < $8 AND o.above = 0)
  AND i.{column} IS NULL
"""

_REPLACE: Final = """
DELETE FROM inbox_{version} i USING unnest($1::text[], $2::text[], $3::text[]) AS o (tenant, user_id, id)
WHERE i.tenant = o.tenant AND i.user_id = o.user_id AND i.id = o.id
"""

_REPEAT: Final = """
UPDATE inbox_{version} i SET repeated_at = o.at
FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) AS o (tenant, user_id, id, at)
WHERE i.tenant = o.tenant AND i.user_id = o.user_id AND i.id = o.id
"""

_SUPERSEDE: Final = """
UPDATE inbox_{version} i SET superseded_seq = o.seq
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) AS o (tenant, user_id, collapse_key, seq)
WHERE i.tenant = o.tenant AND i.user_id = o.user_id AND i.collapse_key = o.collapse_key AND i.superseded_seq IS NULL
"""

_MARKS: Final = {
    "read": ("read_seq", "read_seq = o.seq, read_at = o.at, read_device = o.device"),
    "archive": ("archived_seq", "archived_seq = o.seq, archived_at = o.at"),
    "recall": ("recalled_seq", "recalled_seq = o.seq, recalled_at = o.at"),
}


class InboxStore(TableStore):
    """The rows of one partition of the logs.

    Args:
        remembered: how many of a user's newest notifications are known when they come again (`projections.folds.repeats`).
    """

    projection = INBOX

    def __init__(
        self, pool: Pool, partition: int, *, version: int | None = None, remembered: int = REMEMBERED_MAX
    ) -> None:
        super().__init__(pool, partition, version=version)
        self._remembered = remembered

    async def _fold(self, connection: Connection, batch: Sequence[Delivered], epoch: str, era: int) -> None:
        entries = decoded(batch)
        writer = _Writer(connection, self._version, era)
        ids = {(*user, clean(e.id)) for user, _, e in entries if e.kind == "notification"}
        known = await writer.known(ids, self._remembered)
        users = fold(entries, epoch, era, known, remembered=self._remembered)
        await writer.write_changes(users)
        new = [row for changes in users.values() for row in changes.rows.values()]
        if new:
            retention = await self._retention(connection, {row.tenant for row in new})
            rows = [(*astuple(row), retention.kept_until(row.tenant, row.stored_at), self._version) for row in new]
            await connection.copy_records_to_table(f"inbox_{self._version}", records=rows, columns=_COLUMNS)


class _Writer:
    """The statements of one batch, each over arrays: a few round trips, however many users there are."""

    def __init__(self, connection: Connection, version: int, era: int) -> None:
        self._connection = connection
        self._version = version
        self._era = era

    async def known(self, ids: set[tuple[str, str, str]], remembered: int) -> dict[User, dict[str, int]]:
        """Which of these ids stand in the table already, and how many newer rows the user has, up to `remembered`."""
        found: dict[User, dict[str, int]] = {}
        for tenant, user, id, since in await self._over(ids, _KNOWN, remembered=int(remembered)):
            found.setdefault((tenant, user), {})[id] = since
        return found

    async def write_changes(self, users: dict[User, UserChanges]) -> None:
        """Write what changes of the rows that stand already."""
        repeated = [(*user, id, at) for user, changes in users.items() for id, at in changes.repeated.items()]
        await self._over(repeated, _REPEAT)
        await self._over([(*user, id) for user, changes in users.items() for id in changes.replaced], _REPLACE)
        for kind, (column, sets) in _MARKS.items():
            marks = [(user, mark) for user, changes in users.items() for mark in getattr(changes, kind)]
            if marks and self._era > 1:
                # For rows of a former era it is not known which log a mark is from, so the marks are written in their order.
                early = [(user, mark) for user, changes in users.items() for mark in _early(getattr(changes, kind))]
                await self._by_id(early, column, sets)
            # Ranges first: they look only at rows without a mark (an index knows those of `read`), ids at one row each.
            ranges = [(*user, m.above, m.up_to, *_facts(m)) for user, m in marks if m.up_to is not None]
            await self._over(ranges, _BY_RANGE, self._era, column=column, sets=sets)
            await self._by_id(marks, column, sets)
        keys = [(*user, key, seq) for user, changes in users.items() for key, seq in changes.superseding.items()]
        await self._over(keys, _SUPERSEDE)

    async def _by_id(self, marks: Iterable[tuple[User, Mark]], column: str, sets: str) -> None:
        first: dict[tuple[User, str], Mark] = {}
        for user, mark in marks:
            for id in mark.ids:
                first.setdefault((user, id), mark)
        rows = [(*user, id, *_facts(mark)) for (user, id), mark in first.items()]
        await self._over(rows, _BY_ID, self._era, column=column, sets=sets)

    async def _over(self, rows: Iterable[Sequence[Any]], statement: str, *args: Any, **words: Any) -> list[Any]:
        """What a statement over the columns of `rows` returns; it is not made when there are none."""
        columns = transposed(list(rows))
        return (
            await self._connection.fetch(statement.format(version=self._version, **words), *columns, *args)
            if columns
            else []
        )


def _early(marks: list[Mark]) -> list[Mark]:
    """The marks before the first that names a range."""
    ranges = [number for number, mark in enumerate(marks) if mark.up_to is not None]
    return marks[: ranges[0]] if ranges else []


def _facts(mark: Mark) -> tuple[Any, ...]:
    return mark.seq, mark.at, mark.device
