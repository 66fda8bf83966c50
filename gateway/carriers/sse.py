"""`GET /v1/stream`: the same session as server-sent events, for where WebSocket is blocked.

The event's id is all that is needed to resume: as `Last-Event-ID`, or as `cursor` in the query. The stream has no way up: reads
go to `POST /v1/inbox/read`, acknowledgements to `POST /v1/ack`.
"""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web

from gateway.access.admission import admit, count_request, user_of
from gateway.carriers.connection import connection_of
from gateway.carriers.ws import bound_unsent
from gateway.context import CONTEXT
from gateway.http.problems import Problem
from gateway.session.frames import check_device
from gateway.session.outlet import EventStreamOutlet
from gateway.session.session import Session
from seamark.protocol.errors import BadFrame


async def stream(request: web.Request) -> web.StreamResponse:
    """One stream, until the client leaves, the token expires or the gateway closes it."""
    context = request.app[CONTEXT]
    admit(request, context)
    claims = await user_of(request, context)
    count_request(request, context, claims)
    device = device_of(request)
    seen = request.headers.get("Last-Event-ID")
    cursor = seen or request.query.get("cursor")
    # A browser that reconnects by itself repeats the query, but its page holds what has come since.
    snapshot = wants_snapshot(request) and not seen
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )
    response.force_close()
    await response.prepare(request)
    connection = connection_of(request)
    transport = connection.transport
    if transport is None:
        return response
    bound_unsent(transport)
    # A proxy that speaks HTTP/1.0 (nginx, unless told otherwise) knows no chunks: for it the end is that of the connection.
    outlet = EventStreamOutlet(transport, context.flusher, context.wheel, chunked=request.version >= HttpVersion11)
    session = Session(context, outlet, "sse")
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish() -> None:
        if not over.done():
            over.set_result(None)

    outlet.on_writable = session.writable
    outlet.on_closed = finish
    connection.on_writable = outlet.writable
    connection.on_lost = finish
    try:
        session.start(claims, device, cursor, snapshot=snapshot)
        await over
    finally:
        session.gone()
        outlet.on_writable = outlet.on_closed = None
    return response


def device_of(request: web.Request) -> str:
    """The device named in the query.

    Raises:
        Problem: 400, it is missing or cannot name a device.
    """
    try:
        return check_device(request.query.get("device", ""))
    except BadFrame as error:
        raise Problem(400, "invalid_device", f"{error}; give it in the query", field="device") from error


def wants_snapshot(request: web.Request) -> bool:
    """Whether the query says `snapshot=true`: the client has lost what it showed.

    Raises:
        Problem: 400, it says neither `true` nor `false`.
    """
    text = request.query.get("snapshot", "false")
    if text not in ("true", "false"):
        raise Problem(400, "invalid_query", "`snapshot` is `true` or `false`", field="snapshot")
    return text == "true"
