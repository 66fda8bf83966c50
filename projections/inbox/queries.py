"""What is asked of the inbox: pages, snapshots, where a device stands. Each answer is one statement, so one moment."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Final, NamedTuple

import asyncpg
import msgspec

from engine.postgres import Pool, asking
from projections.postgres.versions import live
from projections.store import Checkpoint
from seamark.protocol.cursor import Cursor
from seamark.protocol.limits import LABEL_CHARS_MAX
from seamark.protocol.subjects import encode_token, log_stream, partition_of

PAGE_ROWS: Final = 100
"""Rows of a page, and of a snapshot: what a screen shows and a few turns more."""

PAGE_BYTES: Final = 1 << 20
"""Bytes of records in a page. The first row always fits, and rows beyond are left for the next page. A hundred of the largest
rows would be 25 MiB, which a gateway holds for as long as the client takes to read them, for each request of each user."""

QUERY_SECONDS: Final = 2.0
"""One page; then the gateway says 503."""

SNAPSHOT_SECONDS: Final = 0.75
"""A device waits for it: without an answer it gets what the log holds."""

DEVICE_SECONDS: Final = 0.5
"""The same for the place where it was."""

_PAGE_CURSOR: Final = re.compile(r"([0-9]{1,9})\.([0-9]{1,18})", re.ASCII)


class InvalidPage(ValueError):
    """A page cursor is none of ours."""


class PageCursor(NamedTuple):
    """The last row of a page: the next one begins after it. Opaque to clients."""

    era: int
    seq: int

    def __str__(self) -> str:
        return f"{self.era}.{self.seq}"


def parse_page_cursor(text: str) -> PageCursor:
    """The cursor written as `text`.

    Raises:
        InvalidPage: it is none.
    """
    found = _PAGE_CURSOR.fullmatch(text)
    if found is None:
        raise InvalidPage("`cursor` is none that a page of the inbox has given")
    return PageCursor(int(found[1]), int(found[2]))


Label = Annotated[str, msgspec.Meta(min_length=1, max_length=LABEL_CHARS_MAX, pattern=r"^[^\u0000]*$")]
"""A category or type, as PostgreSQL can hold it."""


class Filter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which rows. None: whichever.

    Attributes:
        unread: only unread ones, or only read ones.
        archived: only archived ones, or only others.
        category, type: only these; a `type` ending in `.*` takes all below it.
    """

    unread: bool | None = None
    archived: bool | None = False
    category: Label | None = None
    type: Label | None = None


class Page(NamedTuple):
    """Rows newest first, as JSON objects; the cursor of the next page, None behind the last; what they are true at."""

    rows: list[msgspec.Raw]
    next: PageCursor | None
    checkpoint: Checkpoint | None


_LIVE: Final = live("inbox")
SHOWN_AT: Final = (
    "shown AND recalled_seq IS NULL AND superseded_seq IS NULL AND (expires_at IS NULL OR expires_at > {now})"
)
_SHOWN: Final = SHOWN_AT.format(now="now()")
UNREAD: Final = "read_seq IS NULL AND archived_seq IS NULL"

_PAGE: Final = f"""
SELECT c.epoch AS at_epoch, c.seq AS at_seq, r.*
FROM (SELECT {_LIVE} AS version) v
LEFT JOIN projection_checkpoints c
    ON c.projection = 'inbox' AND c.version = v.version AND c.stream = $3 AND c.partition = $4
LEFT JOIN LATERAL (
    SELECT id, era, seq, CASE WHEN before < {PAGE_BYTES} THEN record END AS record, read_at, archived_at, carried
    FROM (
        SELECT *, sum(octet_length(record)) OVER (ORDER BY era DESC, seq DESC) - octet_length(record) AS before
        FROM (
            SELECT id, era, seq, record, read_at, archived_at, carried FROM inbox
            WHERE version = {_LIVE} AND tenant = $1 AND user_id = $2 AND {_SHOWN} {{where}}
            ORDER BY era DESC, seq DESC LIMIT {{limit}}
        ) newest
    ) sized
    ORDER BY era DESC, seq DESC
) r ON true
"""

_DEVICE: Final = f"""
SELECT epoch, seq FROM device_cursors WHERE tenant = $1 AND user_id = $2 AND device = $3
    AND version = {live("deliveries")}
"""


class InboxQueries:
    """Reads of the tables in PostgreSQL."""

    def __init__(self, pool: Pool, partitions: int) -> None:
        self._pool = pool
        self._partitions = partitions

    async def page(
        self,
        tenant: str,
        user: str,
        which: Filter,
        *,
        after: PageCursor | None = None,
        limit: int = PAGE_ROWS,
        seconds: float = QUERY_SECONDS,
    ) -> Page:
        """One page of a user's inbox, newest first: at most `limit` rows, and no more than have `PAGE_BYTES` together.

        Raises:
            StoreUnavailable: no answer in time.
        """
        if _unknowable(tenant, user):
            return Page([], None, None)
        partition = partition_of(encode_token(tenant), encode_token(user), self._partitions)
        args: list[Any] = [tenant, user, log_stream(partition), partition]
        where = _conditions(which, after, args)
        if _unknowable(*args):
            return Page([], None, None)
        statement = _PAGE.format(where=where, limit=int(limit) + 1)
        async with asking(self._pool, seconds) as connection:
            found = await connection.fetch(statement, *args)
        checkpoint = Checkpoint(found[0]["at_epoch"], found[0]["at_seq"]) if found[0]["at_epoch"] else None
        rows = [row for row in found if row["id"] is not None]
        fitting = [row for row in rows[:limit] if row["record"] is not None]
        more, rows = len(rows) > len(fitting), fitting
        last = PageCursor(rows[-1]["era"], rows[-1]["seq"]) if more else None
        return Page([_as_json(row) for row in rows], last, checkpoint)

    async def snapshot(self, tenant: str, user: str) -> Page:
        """What a device shows in place of history: the newest rows and the checkpoint they are true at."""
        return await self.page(tenant, user, Filter(), seconds=SNAPSHOT_SECONDS)

    async def device_cursor(self, tenant: str, user: str, device: str) -> Cursor | None:
        """How far a device has acknowledged its user's log; None when nothing is known of it."""
        if _unknowable(tenant, user, device):
            return None
        async with asking(self._pool, DEVICE_SECONDS) as connection:
            row = await connection.fetchrow(_DEVICE, tenant, user, device)
        return None if row is None else Cursor(row["epoch"], row["seq"])

    async def ids(self, tenant: str, user: str, which: Filter, limit: int) -> list[str]:
        """The ids of the newest rows that `which` names."""
        args: list[Any] = [tenant, user]
        where = _conditions(which, None, args)
        if _unknowable(*args):
            return []
        statement = (
            f"SELECT id FROM inbox WHERE version = {_LIVE} AND tenant = $1 AND user_id = $2 AND {_SHOWN} {where}"
            f" ORDER BY era DESC, seq DESC LIMIT {int(limit)}"
        )
        async with asking(self._pool, QUERY_SECONDS) as connection:
            return [row["id"] for row in await connection.fetch(statement, *args)]


def _unknowable(*args: Any) -> bool:
    """PostgreSQL knows no NUL: no row can have such a name."""
    return any(isinstance(arg, str) and "\0" in arg for arg in args)


def _conditions(which: Filter, after: PageCursor | None, args: list[Any]) -> str:
    """Conditions of a filter; their values are added to `args`."""
    found = []

    def given(value: Any) -> str:
        args.append(value)
        return f"${len(args)}"

    if which.unread is not None:
        found.append(UNREAD if which.unread else "read_seq IS NOT NULL")
    if which.archived is not None:
        found.append("archived_seq IS NOT NULL" if which.archived else "archived_seq IS NULL")
    if which.category is not None:
        found.append(f"category = {given(which.category)}")
    if which.type is not None:
        below = which.type.removesuffix(".*")
        found.append(
            f"type = {given(which.type)}" if below == which.type else f"starts_with(type, {given(below + '.')})"
        )
    if after is not None:
        found.append(f"(era, seq) < ({given(after.era)}, {given(after.seq)})")
    return "".join(f" AND {one}" for one in found)


def _as_json(row: asyncpg.Record) -> msgspec.Raw:
    """The record as the log holds it, with what the inbox knows in front."""
    head: dict[str, Any] = {"seq": row["seq"], "read": row["read_at"] is not None, "read_at": _text(row["read_at"])}
    if row["archived_at"] is not None:
        head["archived_at"] = _text(row["archived_at"])
    if row["carried"]:
        head["carried"] = True
    record = bytes(row["record"]).strip()
    return msgspec.Raw(msgspec.json.encode(head)[:-1] + b"," + record[1:])


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat().replace("+00:00", "Z")
