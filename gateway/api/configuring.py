"""What endpoints of the directory share: its connections, pages, versions."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from engine.directory.bell import ring
from engine.directory.changes import Change, changing
from engine.postgres import Pool
from gateway.access.shares import Shares
from gateway.context import Context
from gateway.http.problems import INVALID_QUERY, UNAVAILABLE, Problem
from gateway.limits import DIRECTORY_PAGE_ITEMS, DIRECTORY_REQUESTS, DIRECTORY_REQUESTS_PER_TENANT

PLACES: Final = Shares(DIRECTORY_REQUESTS, DIRECTORY_REQUESTS_PER_TENANT)
"""Of a process, for all requests that ask the directory."""

Version = Annotated[int, Meta(ge=0)]

CURSOR_CHARS_MAX: Final = 1024


class VersionQuery(msgspec.Struct, frozen=True):
    """`version`: change it only if it still has this one; 0: only if there is none. Left out: whichever there is."""

    version: Version | None = None


class PageQuery(msgspec.Struct, frozen=True):
    """How many, and where to go on. `cursor`: the `next` of the page before."""

    limit: Annotated[int, Meta(ge=1, le=DIRECTORY_PAGE_ITEMS)] = 50
    cursor: str | None = None


class Deleted(msgspec.Struct):
    """`deleted`: false where there was nothing to delete."""

    deleted: bool


def directory_of(context: Context) -> Pool:
    """The connections.

    Raises:
        Problem: 503, this gateway has no database.
    """
    if context.directory is None:
        raise Problem(UNAVAILABLE, "this gateway has no database: there is no directory")
    return context.directory


@asynccontextmanager
async def rules_changing(context: Context, tenant: str) -> AsyncIterator[Change]:
    """A transaction that may change a tenant's rules; afterwards every process is told of it."""
    async with changing(directory_of(context), tenant) as change:
        yield change
    if change.made:
        await ring(context.broker)


def cursor_after(*key: str) -> str:
    """The cursor of what follows the row with this key. Opaque to clients."""
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def key_of(cursor: str | None, parts: int = 1) -> tuple[str, ...]:
    """The key that a cursor was made of; empty texts where there is none.

    Raises:
        Problem: 400, it is none of ours.
    """
    if cursor is None:
        return ("",) * parts
    try:
        if len(cursor) > CURSOR_CHARS_MAX:
            raise ValueError("too long")
        key = msgspec.json.decode(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)), type=tuple[str, ...])
        if len(key) != parts or any("\0" in part for part in key):
            raise ValueError("not as long as a key, or with a NUL")
    except ValueError as error:  # of the decoders, too
        raise Problem(INVALID_QUERY, "`cursor` is none that a page has given", field="cursor") from error
    return key
