"""`POST /v1/inbox/read` and `/archive`: the frame `read` as a request, for clients without a way up, and its sibling.

What is asked for becomes a record of the log, and the log changes every device and every projection.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from engine.errors import BrokerError, OtherIncarnation
from gateway.access.admission import admit_user
from gateway.access.auth import Claims
from gateway.api.inbox_page import queries_of
from gateway.api.positions import log_state, seq_of
from gateway.context import CONTEXT, Context
from gateway.http.bodies import read_body
from gateway.http.problems import Problem, field_of, unavailable
from gateway.limits import FRAME_BYTES, READ_IDS
from gateway.log.partition import Partition
from gateway.session.frames import check_device, check_read
from gateway.session.state_records import Kind, TooManyRecords
from projections.inbox.queries import Filter
from projections.store import StoreUnavailable
from seamark.protocol.cursor import Cursor
from seamark.protocol.errors import BadFrame
from seamark.protocol.frames import Read
from seamark.protocol.limits import LABEL_CHARS_MAX


class ReadBody(msgspec.Struct):
    """As the frame, with the device named; or a `filter`: what the inbox shows now, newest first, up to 500 at a time."""

    device: str
    ids: list[str] | None = None
    up_to: str | None = None
    all: bool = False
    filter: Filter | None = None


_decode = msgspec.json.Decoder(ReadBody).decode


async def read(request: web.Request) -> web.StreamResponse:
    """Append a read record; 202 with its id once it is stored. All devices of the user see it in their log."""
    return await _mark(request, "read")


async def archive(request: web.Request) -> web.StreamResponse:
    """The same for `archive`."""
    return await _mark(request, "archive")


async def _mark(request: web.Request, kind: Kind) -> web.StreamResponse:
    context = request.app[CONTEXT]
    claims = await admit_user(request, context)
    body = _body(await read_body(request, FRAME_BYTES), kind)
    if body.filter is not None:
        return await _mark_filtered(context, claims, kind, body, body.filter)
    partition = context.partition(claims.tenant, claims.user)
    up_to = await _up_to(body, partition, kind)
    id = await _append(context, claims, kind, body.device, body.ids or [], up_to)
    return web.json_response({"id": id}, status=202)


def _body(data: bytes, kind: Kind) -> ReadBody:
    try:
        body = _decode(data)
        check_device(body.device)
        _check_labels(body.filter)
        if body.filter is None or body.ids is not None or body.up_to is not None or body.all:
            if body.filter is not None:
                raise BadFrame("`filter` stands alone: leave out `ids`, `up_to` and `all`", field="filter")
            check_read(Read(ids=body.ids, up_to=body.up_to, all=body.all))
    except BadFrame as error:
        raise Problem(400, f"invalid_{kind}", str(error), field=error.field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"invalid_{kind}", str(error), field=field_of(error)) from error
    return body


def _check_labels(which: Filter | None) -> None:
    for name, text in (("category", which.category), ("type", which.type)) if which is not None else ():
        if text is not None and (not 0 < len(text) <= LABEL_CHARS_MAX or "\0" in text):
            raise BadFrame(f"`filter.{name}` has 1 to {LABEL_CHARS_MAX} characters", field=f"filter.{name}")


async def _mark_filtered(
    context: Context, claims: Claims, kind: Kind, body: ReadBody, which: Filter
) -> web.StreamResponse:
    """By ids, as the inbox holds them now: what comes later is not meant. `more`: ask again for the rest."""
    undone = {"unread": True} if kind == "read" else {"archived": False}
    which = msgspec.structs.replace(which, **undone)
    try:
        found = await queries_of(context).ids(claims.tenant, claims.user, which, READ_IDS + 1)
    except StoreUnavailable as error:
        raise unavailable("the inbox does not answer: try again") from error
    ids, more = found[:READ_IDS], len(found) > READ_IDS
    id = await _append(context, claims, kind, body.device, ids, None) if ids else None
    return web.json_response({"id": id, "count": len(ids), "more": more}, status=202)


async def _up_to(body: ReadBody, partition: Partition, kind: Kind) -> Cursor | None:
    """The position read up to: what the cursor says, never beyond the log's end; `all` is that end."""
    if body.ids is not None:
        return None
    state = await log_state(partition)
    seq = state.last_seq if body.up_to is None else seq_of(body.up_to, "up_to", state, f"invalid_{kind}")
    return Cursor(state.epoch, seq)


async def _append(
    context: Context, claims: Claims, kind: Kind, device: str, ids: list[str], up_to: Cursor | None
) -> str:
    """Store the record; its id.

    Raises:
        Problem: 409, the log was made anew; 429, the user has had too many appended; 503, the log does not take it now.
    """
    partition = context.partition(claims.tenant, claims.user)
    known = partition.watch.last
    try:
        return await context.state_records.append(
            kind,
            tenant=claims.tenant,
            user=claims.user,
            device=device,
            partition=partition.number,
            epoch=up_to.epoch if up_to else known.epoch if known else "",
            ids=ids,
            up_to=up_to.seq if up_to else None,
        )
    except OtherIncarnation as error:
        raise Problem(409, "stale_cursor", "the log was made anew before this was stored", field="up_to") from error
    except TooManyRecords as error:
        raise Problem(429, "too_many_reads", str(error), retry_after_seconds=error.retry_after_seconds) from error
    except BrokerError as error:
        raise unavailable(f"the {kind} could not be stored: try again") from error
