"""`POST /v1/inbox/read`: the frame `read` as a request, for clients without a way up."""

from __future__ import annotations

import msgspec
from aiohttp import web

from engine.cursor import parse_cursor
from engine.errors import BrokerError, InvalidCursor
from engine.records import state_record
from engine.subjects import log_subject
from gateway.admission import admit, user_of
from gateway.bodies import read_body
from gateway.context import CONTEXT, Context
from gateway.frames import BadFrame, Read, check_device, check_read
from gateway.limits import FRAME_BYTES
from gateway.partition import Partition
from gateway.problems import Problem, unavailable


class ReadBody(msgspec.Struct, forbid_unknown_fields=True):
    """As the frame, with the device named."""

    device: str
    ids: list[str] | None = None
    up_to: str | None = None
    all: bool = False


_decode = msgspec.json.Decoder(ReadBody).decode


async def read(request: web.Request) -> web.StreamResponse:
    """Append a read record; 202 with its id once it is stored. All devices of the user see it in their log."""
    context = request.app[CONTEXT]
    admit(request, context)
    claims = await user_of(request, context)
    data = await read_body(request, FRAME_BYTES)
    try:
        body = _decode(data)
        check_device(body.device)
        check_read(Read(ids=body.ids, up_to=body.up_to, all=body.all))
    except (msgspec.DecodeError, UnicodeDecodeError, BadFrame) as error:
        raise Problem(400, "invalid_read", str(error)) from error
    partition = context.partition(claims.tenant, claims.user)
    up_to = await _up_to(body, partition)
    id, record = state_record(
        "read", tenant=claims.tenant, user=claims.user, device=body.device, ids=body.ids or [], up_to=up_to
    )
    await _append(context, log_subject(partition.number, claims.tenant, claims.user), record, id)
    return web.json_response({"id": id}, status=202)


async def _up_to(body: ReadBody, partition: Partition) -> int | None:
    """The sequence read up to: what the cursor says, never beyond the log's end; `all` is that end."""
    if body.ids is not None:
        return None
    state = await partition.watch.state()
    if state is None:
        raise unavailable("the log does not answer: try again")
    if body.up_to is None:
        return state.last_seq
    try:
        cursor = parse_cursor(body.up_to)
    except InvalidCursor as error:
        raise Problem(400, "invalid_read", str(error), field="up_to") from error
    if cursor.epoch != state.epoch or cursor.seq > state.last_seq:
        raise Problem(409, "stale_cursor", "`up_to` does not belong to this incarnation of the log", field="up_to")
    return cursor.seq


async def _append(context: Context, subject: str, record: bytes, id: str) -> None:
    try:
        await context.broker.append(subject, record, msg_id=id, budget_seconds=10.0)
    except BrokerError as error:
        raise unavailable("the read could not be stored: try again") from error
