"""`POST /v1/ack`: the frame `ack` as a request, for devices on server-sent events or polling, which have no way up.

The session that has sent the records may be in another process, or over. So the request says where the range begins.
"""

from __future__ import annotations

import msgspec

from gateway.access.principals import User
from gateway.api.positions import STALE_CURSOR, log_state, seq_of
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, Problem
from gateway.limits import FRAME_BYTES
from gateway.session.frames import check_device
from gateway.session.receipts import acknowledged


class AckBody(msgspec.Struct):
    """All records after `after` up to `cursor` have reached the device."""

    device: str
    after: str
    cursor: str

    def __post_init__(self) -> None:
        """Raise ValueError where `device` cannot name one."""
        check_device(self.device)


class Acknowledged(msgspec.Struct):
    """An empty object."""


@Endpoint("POST", "/v1/ack", status=202, body_bytes=FRAME_BYTES, refuses=(STALE_CURSOR,))
async def acknowledge(call: Call[User, None, AckBody]) -> Acknowledged:
    """Acknowledge records. The receipt is stored within a second. It may be lost, as over a WebSocket; a later one covers it."""
    user, body = call.principal, call.body
    partition = call.context.partition(user.tenant, user.user)
    state = await log_state(partition)
    after, up_to = (seq_of(text, field, state) for text, field in ((body.after, "after"), (body.cursor, "cursor")))
    if after > up_to:
        raise Problem(INVALID_BODY, "`after` lies behind `cursor`", field="after")
    if after < up_to:
        who = (user.tenant, user.user, body.device)
        traces, trace = call.context.recent_traces.of(who, state.epoch), None
        if traces is not None:
            traces.acknowledged(up_to)
            trace = traces.newest(after, up_to)
        call.context.receipts.add([acknowledged(partition.number, *who, state.epoch, after, up_to, trace)])
    return Acknowledged()
