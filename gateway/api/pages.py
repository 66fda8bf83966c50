"""Pages of lists that are read by a key: so many items behind one, and a cursor for where the next page begins.

Who is added or leaves meanwhile moves nothing else to another page, since a cursor stands for a key and not for a count.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Final, TypeVar

import msgspec

from gateway.http.problems import INVALID_QUERY, Problem
from seamark.protocol.moments import check_moment

CURSOR_CHARS_MAX: Final = 1024
"""Three names of 128 bytes each, written as JSON and in base64."""

T = TypeVar("T")

Limit = Annotated[int, msgspec.Meta(ge=1, le=250)]


class PageQuery(msgspec.Struct, frozen=True):
    """A part of a list. `cursor`: the `next` of the page before."""

    limit: Limit = 50
    cursor: str | None = None


def begin_of(query: PageQuery, parts: int = 1) -> tuple[str, ...]:
    """The key behind which the page begins: of so many texts, all of them empty where it is the first page.

    Raises:
        Problem: 400, no page has given this cursor.
    """
    if query.cursor is None:
        return ("",) * parts
    key = _key_of(query.cursor)
    if key is None or len(key) != parts:
        raise invalid_cursor()
    return key


def invalid_cursor() -> Problem:
    """What to raise for a cursor that no page has given."""
    return Problem(INVALID_QUERY, "`cursor` is none that a page has given: begin without it", field="cursor")


def moment_of(text: str) -> datetime:
    """The moment that a part of a cursor says.

    Raises:
        Problem: 400, no page has given a cursor with it.
    """
    try:
        at = datetime.fromisoformat(text)
        check_moment("cursor", at)
    except ValueError as error:
        raise invalid_cursor() from error
    return at


def cut(rows: Sequence[T], limit: int, key: Callable[[T], Sequence[str]]) -> tuple[list[T], str | None]:
    """The rows of a page out of those that were read, one more than it has, and the cursor of the next page."""
    return list(rows[:limit]), cursor_after(key(rows[limit - 1])) if len(rows) > limit else None


def cursor_after(key: Sequence[str]) -> str:
    """The cursor of what follows the row with this key: opaque, so that nobody builds one."""
    return base64.urlsafe_b64encode(msgspec.json.encode(list(key))).decode().rstrip("=")


def _key_of(cursor: str) -> tuple[str, ...] | None:
    if len(cursor) > CURSOR_CHARS_MAX:
        return None
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        key = msgspec.json.decode(text, type=tuple[str, ...])
    except ValueError:  # of either decoder
        return None
    # A text with a NUL is in no row, and PostgreSQL would not take it.
    return key if cursor_after(key) == cursor and not any("\0" in part for part in key) else None
