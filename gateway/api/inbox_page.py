"""`GET /v1/inbox`: pages of a user's inbox, newest first."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.access.principals import User
from gateway.context import Context
from gateway.http.endpoint import Call, endpoint
from gateway.http.problems import INVALID_QUERY, UNAVAILABLE, Problem
from projections.inbox.queries import PAGE_ROWS, Filter, InboxQueries, InvalidPage, Label, parse_page_cursor
from seamark.protocol.cursor import Cursor
from seamark.protocol.records import Record

Choice = Literal["true", "false", "any"]


class InboxQuery(msgspec.Struct, frozen=True):
    """Which rows, and how many. `type`: one, or with `.*` at its end all below it. `cursor`: the `next` of the page before."""

    unread: Choice = "any"
    archived: Choice = "false"
    category: Label | None = None
    type: Label | None = None
    limit: Annotated[int, Meta(ge=1)] = PAGE_ROWS
    cursor: str | None = None


class Item(Record, kw_only=True):
    """A record of the log, and what the inbox knows of it."""

    seq: int
    read: bool
    read_at: datetime | None
    archived_at: datetime | UnsetType = UNSET
    carried: bool | UnsetType = UNSET
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class InboxPage(msgspec.Struct):
    """Newest first.

    Attributes:
        next: the `cursor` of the following page; null behind the last.
        as_of: the log's cursor that the page is true at: whoever follows the log from there misses nothing.
    """

    items: list[Item]
    next: str | None
    as_of: str | None


@endpoint("GET", "/v1/inbox")
async def inbox_page(call: Call[User, InboxQuery, None]) -> InboxPage:
    """A page of the user's inbox, newest first. It may be shorter than `limit`, where its rows have more than 1 MiB."""
    query, user = call.query, call.principal
    which = Filter(_yes(query.unread), _yes(query.archived), query.category, query.type)
    try:
        after = parse_page_cursor(query.cursor) if query.cursor is not None else None
    except InvalidPage as error:
        raise Problem(INVALID_QUERY, str(error), field="cursor") from error
    limit = min(query.limit, PAGE_ROWS)
    found = await inbox_of(call.context).page(user.tenant, user.user, which, after=after, limit=limit)
    return InboxPage(
        items=cast("list[Item]", found.rows),  # the stored bytes, which are never decoded
        next=str(found.next) if found.next is not None else None,
        as_of=str(Cursor(*found.checkpoint)) if found.checkpoint is not None else None,
    )


def _yes(choice: Choice) -> bool | None:
    return None if choice == "any" else choice == "true"


def inbox_of(context: Context) -> InboxQueries:
    """The inbox, where there is one.

    Raises:
        Problem: 503, this gateway has no database.
    """
    if context.tables is None:
        raise Problem(UNAVAILABLE, "this gateway has no database: there is no inbox")
    return context.tables.inbox
