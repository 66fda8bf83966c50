"""`GET /v1/inbox`: pages of a user's inbox, newest first, and the choice of rows that other requests name by a filter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from aiohttp import web

from gateway.access.admission import admit_user
from gateway.context import CONTEXT, Context
from gateway.http.problems import Problem, unavailable
from projections.inbox.queries import PAGE_ROWS, Filter, InboxQueries, InvalidPage, parse_page_cursor
from projections.store import StoreUnavailable
from seamark.protocol.cursor import Cursor

_LABEL_CHARS: Final = 128
_WORDS: Final[Mapping[str, bool | None]] = {"true": True, "false": False, "any": None}

_encode = msgspec.json.Encoder().encode


async def page(request: web.Request) -> web.StreamResponse:
    """`{"items", "next", "as_of"}`: `next` is the `cursor` of the following page, null behind the last.

    `as_of` is the log's cursor that the rows are true at: whoever follows the log from there misses nothing.
    """
    context = request.app[CONTEXT]
    claims = await admit_user(request, context)
    queries = queries_of(context)
    which = _filter(request)
    limit = _limit(request)
    try:
        after = parse_page_cursor(request.query["cursor"]) if "cursor" in request.query else None
    except InvalidPage as error:
        raise Problem(400, "invalid_query", str(error), field="cursor") from error
    try:
        found = await queries.page(claims.tenant, claims.user, which, after=after, limit=limit)
    except StoreUnavailable as error:
        raise unavailable("the inbox does not answer: try again") from error
    answer = {
        "items": found.rows,
        "next": str(found.next) if found.next is not None else None,
        "as_of": str(Cursor(*found.checkpoint)) if found.checkpoint is not None else None,
    }
    return web.Response(body=_encode(answer), content_type="application/json", headers={"Cache-Control": "no-store"})


def queries_of(context: Context) -> InboxQueries:
    """The inbox, where there is one.

    Raises:
        Problem: 503, this gateway has no database.
    """
    if context.tables is None:
        raise unavailable("this gateway has no database: there is no inbox")
    return context.tables.inbox


def _filter(request: web.Request) -> Filter:
    query = request.query
    return Filter(
        unread=_word(request, "unread", "any"),
        archived=_word(request, "archived", "false"),
        category=_label(query.get("category"), "category"),
        type=_label(query.get("type"), "type"),
    )


def _word(request: web.Request, name: str, default: str) -> bool | None:
    text = request.query.get(name, default)
    if text not in _WORDS:
        raise Problem(400, "invalid_query", f"`{name}` is `true`, `false` or `any`", field=name)
    return _WORDS[text]


def _label(text: str | None, name: str) -> str | None:
    if text is not None and not 0 < len(text) <= _LABEL_CHARS:
        raise Problem(400, "invalid_query", f"`{name}` has 1 to {_LABEL_CHARS} characters", field=name)
    return text


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(PAGE_ROWS))
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise Problem(400, "invalid_query", "`limit` is a positive number", field="limit")
    return min(int(text), PAGE_ROWS)
