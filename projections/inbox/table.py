"""The inbox of a partition in PostgreSQL: rows, marks and checkpoint change in one transaction or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from engine.broker.jetstream import Broker
from engine.partition.reader import Delivered, Source
from projections.folds.changes import clean
from projections.folds.inbox import Mark, Row, User, UserChanges, decoded, fold
from projections.folds.repeats import REMEMBERED_MAX
from projections.postgres.versions import Book, asking, transaction
from projections.retention.rules import Retention, RetentionCache
from projections.runner import ProjectionWorker
from projections.store import Checkpoint
from seamark.protocol.subjects import log_stream

if TYPE_CHECKING:
    from projections.postgres.versions import Connection, Pool

INBOX: Final = "inbox"

CHECKPOINT_SECONDS: Final = 5.0
"""To read a checkpoint; the runner asks again."""

_COLUMNS: Final = (*Row.__dataclass_fields__, "kept_until", "version")
_values: Final = attrgetter(*Row.__dataclass_fields__)

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


class InboxStore:
    """A `projections.store.Store` of one partition of the logs.

    Args:
        version: a fixed version, for a rebuild; None: whichever is live.
        applied: told the rows a batch has added, once they are stored.
        remembered: how many of a user's newest notifications are known when they come again (`projections.folds.repeats`).
    """

    def __init__(
        self,
        pool: Pool,
        partition: int,
        *,
        version: int | None = None,
        applied: Callable[[list[Row]], None] | None = None,
        remembered: int = REMEMBERED_MAX,
    ) -> None:
        self._pool = pool
        self._book = Book(INBOX, log_stream(partition), partition, version)
        self._applied = applied
        self._remembered = remembered
        self._retention = RetentionCache(INBOX, anew=version is not None)

    async def checkpoint(self) -> Checkpoint | None:
        """The stored checkpoint."""
        async with asking(self._pool, CHECKPOINT_SECONDS) as connection:
            return await self._book.read(connection)

    async def apply(self, batch: Sequence[Delivered], expected: Checkpoint | None, reached: Checkpoint) -> bool:
        """Fold `batch` in: one transaction, alone from the moment it moves the checkpoint.

        So an id stands in the inbox once, although no index covers all months: only the transaction that moves this checkpoint
        adds rows of these users, and it looks for their ids first.
        """
        entries = decoded(batch)
        retention = await self._retention.of(self._pool, self._book.version)
        async with transaction(self._pool) as connection:
            era = await self._book.move(connection, expected, reached)
            if era is None:
                return False
            writer = _Writer(connection, self._book.version, era, retention)
            ids = {(user, clean(e.id)) for user, _, e in entries if e.kind == "notification"}
            known = await writer.known(ids, self._remembered)
            users = fold(entries, reached.epoch, era, known, remembered=self._remembered)
            await writer.write(users)
        if self._applied is not None:
            self._applied([row for changes in users.values() for row in changes.rows.values()])
        return True


class _Writer:
    """The statements of one batch, each over arrays: a few round trips, however many users there are."""

    def __init__(self, connection: Connection, version: int, era: int, retention: Retention) -> None:
        self._connection = connection
        self._version = version
        self._era = era
        self._retention = retention

    async def known(self, ids: set[tuple[User, str]], remembered: int) -> dict[User, dict[str, int]]:
        """Which of these ids stand in the table already, and how many newer rows the user has, up to `remembered`."""
        if not ids:
            return {}
        columns = [[user[0] for user, _ in ids], [user[1] for user, _ in ids], [id for _, id in ids]]
        statement = _KNOWN.format(version=self._version, remembered=int(remembered))
        found: dict[User, dict[str, int]] = {}
        for row in await self._connection.fetch(statement, *columns):
            found.setdefault((row["tenant"], row["user_id"]), {})[row["id"]] = row["since"]
        return found

    async def write(self, users: dict[User, UserChanges]) -> None:
        """Marks on the rows that stand and stay, then the new rows."""
        replaced = [(*user, id) for user, changes in users.items() for id in changes.replaced]
        if replaced:
            columns = [list(column) for column in zip(*replaced, strict=True)]
            await self._connection.execute(_REPLACE.format(version=self._version), *columns)
        for kind, (column, sets) in _MARKS.items():
            marks = [(user, mark) for user, changes in users.items() for mark in getattr(changes, kind)]
            if marks:
                if self._era > 1:
                    # For rows of a former era it is not known which log a mark is from, so the marks are written in their order.
                    before = [
                        (user, mark) for user, changes in users.items() for mark in _early(getattr(changes, kind))
                    ]
                    await self._by_id(before, column, sets)
                # Ranges first: they look only at rows without a mark (an index knows those of `read`), ids at one row each.
                await self._by_range(marks, column, sets)
                await self._by_id(marks, column, sets)
        await self._supersede(users)
        now, kept_until = datetime.now(UTC), self._retention.kept_until
        rows = [
            (*_values(row), kept_until(row.tenant, row.stored_at, now), self._version)
            for changes in users.values()
            for row in changes.rows.values()
        ]
        if rows:
            await self._connection.copy_records_to_table(f"inbox_{self._version}", records=rows, columns=_COLUMNS)

    async def _by_id(self, marks: Iterable[tuple[User, Mark]], column: str, sets: str) -> None:
        first: dict[tuple[User, str], Mark] = {}
        for user, mark in marks:
            for id in mark.ids:
                first.setdefault((user, id), mark)
        if first:
            columns: list[list[Any]] = [
                [user[0] for user, _ in first],
                [user[1] for user, _ in first],
                [id for _, id in first],
                *_facts(first.values()),
            ]
            statement = _BY_ID.format(version=self._version, column=column, sets=sets)
            await self._connection.execute(statement, *columns, self._era)

    async def _by_range(self, marks: Iterable[tuple[User, Mark]], column: str, sets: str) -> None:
        ranges = [(user, mark) for user, mark in marks if mark.up_to is not None]
        if ranges:
            columns: list[list[Any]] = [
                [user[0] for user, _ in ranges],
                [user[1] for user, _ in ranges],
                [mark.above for _, mark in ranges],
                [mark.up_to for _, mark in ranges],
                *_facts(mark for _, mark in ranges),
            ]
            statement = _BY_RANGE.format(version=self._version, column=column, sets=sets)
            await self._connection.execute(statement, *columns, self._era)

    async def _supersede(self, users: dict[User, UserChanges]) -> None:
        keys = [(user, key, seq) for user, changes in users.items() for key, seq in changes.superseding.items()]
        if keys:
            columns: list[list[Any]] = [
                [user[0] for user, _, _ in keys],
                [user[1] for user, _, _ in keys],
                [key for _, key, _ in keys],
                [seq for _, _, seq in keys],
            ]
            await self._connection.execute(_SUPERSEDE.format(version=self._version), *columns)


def _early(marks: list[Mark]) -> list[Mark]:
    """The marks before the first that names a range."""
    ranges = [number for number, mark in enumerate(marks) if mark.up_to is not None]
    return marks[: ranges[0]] if ranges else []


def _facts(marks: Iterable[Mark]) -> list[list[Any]]:
    found = list(marks)
    return [[mark.seq for mark in found], [mark.at for mark in found], [mark.device for mark in found]]


def inbox(
    pool: Pool, applied: Callable[[list[Row]], None] | None = None
) -> tuple[Callable[[int], Source], Callable[[Broker, int], ProjectionWorker]]:
    """What the projector needs: where it reads, and who folds."""

    def source(p: int) -> Source:
        return Source(log_stream(p), f"inbox-{p}", f"log.{p}.>")

    def worker(broker: Broker, p: int) -> ProjectionWorker:
        return ProjectionWorker(broker, INBOX, log_stream(p), InboxStore(pool, p, applied=applied), f"log.{p}.>")

    return source, worker
