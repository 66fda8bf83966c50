"""`POST /v1/inbox/read` and `/archive`: the frame `read` as a request, for clients without a way up, and its sibling.

What is asked for becomes a record of the log, and the log changes every device and every projection.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from engine.errors import BrokerError
from gateway.access.principals import User
from gateway.api.inbox_page import inbox_of
from gateway.http.endpoint import Call, endpoint
from gateway.http.problems import INVALID_BODY, UNAVAILABLE, Kind, Problem
from gateway.limits import FRAME_BYTES, READ_IDS
from gateway.log.partition import Partition
from gateway.session import state_records
from gateway.session.frames import Read, check_device, check_read
from gateway.session.state_records import TooManyRecords
from projections.inbox.queries import Filter
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.errors import InvalidCursor

STALE_CURSOR: Final = Kind(409, "stale_cursor")
TOO_MANY_READS: Final = Kind(429, "too_many_reads")


class ReadBody(msgspec.Struct, forbid_unknown_fields=True):
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
    """The id of the record that says so. By a filter: how many it names, and whether there are more to ask for again."""

    id: str | None
    count: int | UnsetType = UNSET
    more: bool | UnsetType = UNSET


_PROBLEMS: Final = (STALE_CURSOR, TOO_MANY_READS)


@endpoint("POST", "/v1/inbox/read", status=202, body_bytes=FRAME_BYTES, problems=_PROBLEMS)
async def mark_read(call: Call[User, None, ReadBody]) -> Marked:
    """Mark notifications as read, on all devices of the user. Answered once a record that says so is stored."""
    return await _mark(call, "read")


@endpoint("POST", "/v1/inbox/archive", status=202, body_bytes=FRAME_BYTES, problems=_PROBLEMS)
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


async def _up_to(body: ReadBody, partition: Partition) -> int | None:
    """The sequence read up to: what the cursor says, never beyond the log's end; `all` is that end."""
    if body.ids is not None:
        return None
    state = await partition.watch.state()
    if state is None:
        raise Problem(UNAVAILABLE, "the log does not answer: try again")
    if body.up_to is None:
        return state.last_seq
    try:
        cursor = parse_cursor(body.up_to)
    except InvalidCursor as error:
        raise Problem(INVALID_BODY, str(error), field="up_to") from error
    if cursor.epoch != state.epoch or cursor.seq > state.last_seq:
        raise Problem(STALE_CURSOR, "`up_to` does not belong to this incarnation of the log", field="up_to")
    return cursor.seq


async def _append(call: Call[User, None, ReadBody], kind: state_records.Kind, ids: list[str], up_to: int | None) -> str:
    """Store the record; its id.

    Raises:
        Problem: the user has had too many appended, or the log does not take it now.
    """
    user = call.principal
    try:
        return await call.context.state_records.append(
            kind,
            tenant=user.tenant,
            user=user.user,
            device=call.body.device,
            partition=call.context.partition(user.tenant, user.user).number,
            ids=ids,
            up_to=up_to,
        )
    except TooManyRecords as error:
        raise Problem(TOO_MANY_READS, str(error), retry_after_seconds=error.retry_after_seconds) from error
    except BrokerError as error:
        raise Problem(UNAVAILABLE, f"the {kind} could not be stored: try again") from error
