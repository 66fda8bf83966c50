"""`POST /v1/ack`: the frame `ack` as a request, for devices on server-sent events or polling, which have no way up.

The session that has sent the records may be in another process, or over. So the request says where the range begins.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from gateway.access.admission import admit_user
from gateway.api.positions import log_state, seq_of
from gateway.context import CONTEXT
from gateway.http.bodies import read_body
from gateway.http.problems import Problem, field_of
from gateway.limits import FRAME_BYTES
from gateway.session.frames import check_device
from gateway.session.receipts import acknowledged
from seamark.protocol.errors import BadFrame

_INVALID = "invalid_ack"


class AckBody(msgspec.Struct):
    """All records after `after` up to `cursor` have reached the device."""

    device: str
    after: str
    cursor: str


_decode = msgspec.json.Decoder(AckBody).decode


async def ack(request: web.Request) -> web.StreamResponse:
    """202: the receipt is stored within a second. As over a WebSocket, one may be lost with the process: a later one says it."""
    context = request.app[CONTEXT]
    claims = await admit_user(request, context)
    body = _body(await read_body(request, FRAME_BYTES))
    partition = context.partition(claims.tenant, claims.user)
    state = await log_state(partition)
    after, up_to = (
        seq_of(text, field, state, _INVALID) for text, field in ((body.after, "after"), (body.cursor, "cursor"))
    )
    if after > up_to:
        raise Problem(400, _INVALID, "`after` lies behind `cursor`", field="after")
    if after < up_to:
        who = (claims.tenant, claims.user, body.device)
        context.receipts.add([acknowledged(partition.number, *who, state.epoch, after, up_to)])
    return web.json_response({}, status=202)


def _body(data: bytes) -> AckBody:
    try:
        body = _decode(data)
        check_device(body.device)
    except BadFrame as error:
        raise Problem(400, _INVALID, str(error), field=error.field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, _INVALID, str(error), field=field_of(error)) from error
    return body
