"""A user's inbox: pages of it, and what changes it.

`POST /v1/inbox/read` is the frame `read` as a request, for clients without a way up; `/archive` is its sibling. What is asked for
becomes a record of the log, and the log changes every device and every projection.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from engine.errors import BrokerError, OtherIncarnation
from gateway.access.principals import User
from gateway.api.positions import STALE_CURSOR, log_state, seq_of
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_QUERY, UNAVAILABLE, Kind, Problem
from gateway.http.tracing import current_trace
from gateway.limits import FRAME_BYTES, READ_IDS
from gateway.log.partition import Partition
from gateway.session import state_records
from gateway.session.frames import check_device, check_read
from gateway.session.state_records import TooManyRecords
from gateway.session.traces import reading
from projections.inbox.queries import PAGE_ROWS, Filter, InboxQueries, InvalidPage, Label, parse_page_cursor
from seamark.protocol.cursor import Cursor
from seamark.protocol.frames import Read
from seamark.protocol.records import Record

TOO_MANY_READS: Final = Kind(429, "too_many_reads")

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


@Endpoint("GET", "/v1/inbox")
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


class ReadBody(msgspec.Struct):
    """As the frame, with the device named; or a `filter`: what the inbox shows now, newest first, up to 500 at a time."""

    device: str
    ids: list[str] | None = None
    up_to: str | None = None
    all: bool = False
    filter: Filter | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where the members do not go together."""
        check_device(self.device)
        if self.filter is None:
            check_read(Read(ids=self.ids, up_to=self.up_to, all=self.all))
        elif self.ids is not None or self.up_to is not None or self.all:
            raise ValueError("`filter` stands alone: leave out `ids`, `up_to` and `all`")


class Marked(msgspec.Struct):
    """`id`: of the record that marks them. After a filter also `count`, how many it names, and `more`: whether to ask again."""

    id: str | None
    count: int | UnsetType = UNSET
    more: bool | UnsetType = UNSET


_PROBLEMS: Final = (STALE_CURSOR, TOO_MANY_READS)


@Endpoint("POST", "/v1/inbox/read", status=202, body_bytes=FRAME_BYTES, refuses=_PROBLEMS)
async def mark_read(call: Call[User, None, ReadBody]) -> Marked:
    """Mark notifications as read, on all devices of the user. Answered once a record that says so is stored."""
    return await _mark(call, "read")


@Endpoint("POST", "/v1/inbox/archive", status=202, body_bytes=FRAME_BYTES, refuses=_PROBLEMS)
async def mark_archived(call: Call[User, None, ReadBody]) -> Marked:
    """Archive notifications, on all devices of the user. Answered once a record that says so is stored."""
    return await _mark(call, "archive")


async def _mark(call: Call[User, None, ReadBody], kind: state_records.Kind) -> Marked:
    user, body = call.principal, call.body
    if body.filter is None:
        up_to = await _up_to(body, call.context.partition(user.tenant, user.user))
        return Marked(await _append(call, kind, body.ids or [], up_to))
    # By ids, as the inbox holds them now: what comes later is not meant.
    undone = {"unread": True} if kind == "read" else {"archived": False}
    which = msgspec.structs.replace(body.filter, **undone)
    found = await inbox_of(call.context).ids(user.tenant, user.user, which, READ_IDS + 1)
    ids = found[:READ_IDS]
    return Marked(await _append(call, kind, ids, None) if ids else None, len(ids), len(found) > READ_IDS)


async def _up_to(body: ReadBody, partition: Partition) -> Cursor | None:
    """The position read up to: what the cursor says, never beyond the log's end; `all` is that end."""
    if body.ids is not None:
        return None
    state = await log_state(partition)
    return Cursor(state.epoch, state.last_seq if body.up_to is None else seq_of(body.up_to, "up_to", state))


async def _append(
    call: Call[User, None, ReadBody], kind: state_records.Kind, ids: list[str], up_to: Cursor | None
) -> str:
    """Store the record; its id.

    Raises:
        Problem: the log was made anew, the user has had too many appended, or the log does not take it now.
    """
    user = call.principal
    partition = call.context.partition(user.tenant, user.user)
    known = partition.watch.last
    epoch = up_to.epoch if up_to else known.epoch if known else ""
    traces = (
        call.context.recent_traces.of((user.tenant, user.user, call.body.device), epoch) if kind == "read" else None
    )
    try:
        with reading(traces, ids, up_to.seq if up_to else None) as trace:
            return await call.context.state_records.append(
                kind,
                tenant=user.tenant,
                user=user.user,
                device=call.body.device,
                partition=partition.number,
                epoch=epoch,
                ids=ids,
                up_to=up_to.seq if up_to else None,
                trace=current_trace() or trace,
            )
    except OtherIncarnation as error:
        raise Problem(STALE_CURSOR, "the log was made anew before this was stored", field="up_to") from error
    except TooManyRecords as error:
        raise Problem(TOO_MANY_READS, str(error), retry_after_seconds=error.retry_after_seconds) from error
    except BrokerError as error:
        raise Problem(UNAVAILABLE, f"the {kind} could not be stored: try again") from error
