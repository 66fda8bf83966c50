"""The table `control_log`: a copy of the changes in the control bucket.

The bucket is the truth: controls can be changed while PostgreSQL is away, and the rows come later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
import msgspec
import structlog

from engine.controls.document import Change, Document
from engine.postgres import Connection
from engine.tasks import end_if_cancelled
from seamark.backoff import Backoff

_log = structlog.get_logger("seamark.control_log")

QUERY_SECONDS: Final = 5.0

RETRY_SECONDS_MAX: Final = 30.0
"""Longest pause before the table is tried again."""

KEPT_DAYS: Final = 400
"""How long rows are kept: whoever looks back a year finds them."""

_WRITE: Final = """
INSERT INTO control_log (id, number, at, who, why, action, before, after) VALUES ($1, $2, $3, $4, $5, $6, $7::jsonb, $8::jsonb)
ON CONFLICT (id) DO NOTHING
"""

_FORGET: Final = "DELETE FROM control_log WHERE at < now() - make_interval(days => $1)"

_LAST: Final = """
SELECT id, number, at, who, why, action, before::text, after::text FROM control_log ORDER BY at DESC, number DESC LIMIT $1
"""


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change as it stands in the table."""

    id: str
    number: int
    at: datetime
    who: str
    why: str
    action: str
    before: msgspec.Raw | None = None
    after: msgspec.Raw | None = None


async def write(connection: asyncpg.Connection[Any], changes: Sequence[Change]) -> None:
    """Add the changes that have no row yet, and let those go that are too old.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: PostgreSQL does not do it.
    """
    rows = [
        (each.id, each.number, datetime.fromtimestamp(each.at, UTC), each.who, each.why, each.action,
         _json(each.before), _json(each.after))
        for each in changes
    ]  # fmt: skip
    await connection.executemany(_WRITE, rows, timeout=QUERY_SECONDS)
    await forget_old(connection)


async def forget_old(connection: Connection | asyncpg.Connection[Any]) -> None:
    """Let rows go that are too old. Raises as `write`."""
    await connection.execute(_FORGET, KEPT_DAYS, timeout=QUERY_SECONDS)


async def last(connection: asyncpg.Connection[Any], most: int) -> list[Row]:
    """The newest rows, newest first. Raises as `write`."""
    rows = await connection.fetch(_LAST, most, timeout=QUERY_SECONDS)
    return [Row(**{name: _raw(name, value) for name, value in row.items()}) for row in rows]


class LogWriter:
    """Copies changes into the table as it hears of them; however many processes do, each change has one row.

    Args:
        url: of the database.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._written: frozenset[str] = frozenset()
        self._changes: tuple[Change, ...] = ()
        self._wanted = asyncio.Event()

    def note(self, document: Document, new: Sequence[Change]) -> None:
        """What the bucket holds now."""
        self._changes = document.changes
        self._wanted.set()

    async def run(self) -> None:
        """Write until cancelled; while PostgreSQL is away it is tried again, for as long as the bucket remembers the changes."""
        backoff = Backoff(1.0, RETRY_SECONDS_MAX, jitter=0.5)
        while True:
            await self._wanted.wait()
            end_if_cancelled()
            self._wanted.clear()
            changes = self._changes
            missing = [each for each in changes if each.id not in self._written]
            try:
                if missing:
                    await write_to(self._url, missing)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                self._wanted.set()
                pause = backoff.next_seconds()
                _log.warning(
                    "control_log_not_written", error=type(error).__name__, changes=len(missing), again_seconds=pause
                )
                await asyncio.sleep(pause)
            else:
                backoff.succeeded()
                self._written = frozenset(each.id for each in changes)


async def write_to(url: str, changes: Sequence[Change]) -> None:
    """`write` over a connection of its own: changes are rare. Raises as it does."""
    connection = await asyncpg.connect(url, timeout=QUERY_SECONDS)
    try:
        await write(connection, changes)
    finally:
        connection.terminate()


def _json(value: msgspec.Struct | None) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _raw(name: str, value: Any) -> Any:
    return msgspec.Raw(value.encode()) if name in ("before", "after") and value is not None else value
