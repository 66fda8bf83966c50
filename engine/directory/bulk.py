"""Many users at once, in one transaction: all of them are stored, or none. The same again changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import msgspec

from engine.directory.changing import IDLE, Directory, check_not_stopped
from engine.directory.users import UserFields, encoded_attributes
from engine.postgres import Connection, asking

IMPORT_SECONDS: Final = 240.0
"""The whole import, on a machine that others use, too. While it stores what it was sent, other changes of its users wait, and
are given up after their own few seconds. Its marks only have readers ask the primary meanwhile."""

ROWS_PER_TURN: Final = 500
"""Rows that are sent before others get a turn and the progress is told."""

FIELDS: Final = UserFields.__struct_fields__

# `given` has a bit for each field, in their order: what a row does not say stays as it is.
_TABLE: Final = """
CREATE TEMPORARY TABLE imported (
    user_id text COLLATE "C" PRIMARY KEY,
    email text, phone text, locale text, timezone text, attributes jsonb, given integer NOT NULL, email_hash bytea
) ON COMMIT DROP
"""

_COLUMNS: Final = (*FIELDS, "email_hash")

_MERGED: Final = ", ".join(
    f"CASE WHEN i.given & {1 << FIELDS.index(said)} <> 0 OR u.user_id IS NULL THEN i.{name} ELSE u.{name} END AS {name}"
    for name, said in zip(_COLUMNS, (*FIELDS, "email"), strict=True)
)

_SAME: Final = " AND ".join(
    f"(i.given & {1 << bit} = 0 OR i.{name} IS NOT DISTINCT FROM u.{name})" for bit, name in enumerate(FIELDS)
)

_UNCHANGED: Final = f"DELETE FROM imported i USING users u WHERE u.tenant = $1 AND u.user_id = i.user_id AND {_SAME}"

_DELETED: Final = """
DELETE FROM imported i USING profiles p WHERE p.tenant = $1 AND p.user_id = i.user_id AND p.deleted_at IS NOT NULL
"""

_HOLD: Final = """
INSERT INTO profiles (tenant, user_id) SELECT $1, user_id FROM imported ORDER BY user_id
ON CONFLICT (tenant, user_id) DO UPDATE SET version = profiles.version
"""

_MERGE: Final = f"""
WITH wanted AS (
    SELECT i.user_id, {_MERGED}, p.version + 1 AS version
    FROM imported i JOIN profiles p ON p.tenant = $1 AND p.user_id = i.user_id
    LEFT JOIN users u ON u.tenant = $1 AND u.user_id = i.user_id
), stored AS (
    INSERT INTO users AS u (tenant, user_id, {", ".join(_COLUMNS)}, version)
    SELECT $1, user_id, {", ".join(_COLUMNS)}, version FROM wanted
    ON CONFLICT (tenant, user_id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)},
        version = excluded.version, updated_at = now()
    RETURNING u.user_id, u.version, (u.xmax = 0) AS made
), counted AS (
    UPDATE profiles p SET version = s.version FROM stored s WHERE p.tenant = $1 AND p.user_id = s.user_id
)
SELECT count(*) FILTER (WHERE made), count(*) FILTER (WHERE NOT made) FROM stored
"""


class ImportedUser(msgspec.Struct, frozen=True):
    """One user of an import. `given`: the names of the fields that the row says; the others stay as they are."""

    id: str
    fields: UserFields
    given: frozenset[str]

    def row(self) -> tuple[object, ...]:
        """As it is sent to PostgreSQL."""
        bits = sum(1 << bit for bit, name in enumerate(FIELDS) if name in self.given)
        plain = [getattr(self.fields, name) for name in FIELDS[:-1]]
        return self.id, *plain, encoded_attributes(self.fields.attributes), bits, self.fields.email_hash


class Imported(msgspec.Struct, frozen=True):
    """What an import did: users made, changed, and left as they were; `deleted` are passed over, as they have been deleted."""

    made: int
    changed: int
    unchanged: int
    deleted: int


async def import_users(
    directory: Directory,
    tenant: str,
    users: Sequence[ImportedUser],
    progress: Callable[[int], None],
) -> Imported:
    """Store these users, each of whom stands there once.

    Args:
        progress: told how many rows PostgreSQL has.

    Raises:
        StoreUnavailable: no answer in time; then nothing was stored, unless only the last answer was lost.
    """
    async with asking(directory.pool, IMPORT_SECONDS) as connection:
        await connection.execute("BEGIN")
        await connection.execute(_TABLE)
        await connection.copy_records_to_table("imported", records=_rows(users, progress))
        await connection.execute("ANALYZE imported")
        deleted = _count(await connection.execute(_DELETED, tenant))
        unchanged = _count(await connection.execute(_UNCHANGED, tenant))
        ids, began = await _ids(connection), time.monotonic()
        async with directory.announced(tenant, ids, IMPORT_SECONDS):
            await connection.execute(IDLE)
            await connection.execute(_HOLD, tenant)
            # Whoever was deleted since we looked stays deleted: nobody else gets at him now.
            deleted += _count(await connection.execute(_DELETED, tenant))
            counts = await connection.fetchrow(_MERGE, tenant)
            assert counts is not None, "an aggregate has a row"
            check_not_stopped(began, IMPORT_SECONDS)
            await connection.execute("COMMIT")
    return Imported(counts[0], counts[1], unchanged, deleted)


async def _ids(connection: Connection) -> list[str]:
    return [row["user_id"] for row in await connection.fetch("SELECT user_id FROM imported ORDER BY user_id")]


async def _rows(users: Sequence[ImportedUser], progress: Callable[[int], None]) -> AsyncIterator[tuple[object, ...]]:
    for number, user in enumerate(users):
        if number % ROWS_PER_TURN == 0:
            progress(number)
            await asyncio.sleep(0)
        yield user.row()
    progress(len(users))


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])
