"""`GET /v1/stream`: the same session as server-sent events, for where WebSocket is blocked.

The event's id is all that is needed to resume: as `Last-Event-ID`, or as `cursor` in the query. The stream has no way up: reads
go to `POST /v1/inbox/read`, acknowledgements to `POST /v1/ack`.
"""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import HttpVersion11, web

from gateway.access.principals import User
from gateway.carriers.connection import connection_of
from gateway.carriers.ws import bound_unsent
from gateway.http.endpoint import Call, Endpoint
from gateway.session.frames import check_device
from gateway.session.outlet import EventStreamOutlet
from gateway.session.session import Session


class SessionQuery(msgspec.Struct, frozen=True):
    """Which device, and what it holds. `snapshot`: it has lost what it showed, so it gets a `reset` with a snapshot."""

    device: str
    cursor: str | None = None
    snapshot: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where `device` cannot name one."""
        check_device(self.device)


class StreamQuery(SessionQuery, frozen=True):
    """`Last-Event-ID`: the cursor of the last event that has come; it goes before `cursor` and `snapshot`.

    `capabilities`: the client's, separated by commas.
    """

    seen: str | None = msgspec.field(default=None, name="Last-Event-ID")
    capabilities: str = ""


@Endpoint("GET", "/v1/stream", opens_session=True)
async def follow_stream(call: Call[User, StreamQuery, None]) -> web.StreamResponse:
    """Follow the user's log as server-sent events, until the client leaves, the token expires or the gateway closes it."""
    context, request, query = call.context, call.request, call.query
    # A browser that reconnects by itself repeats the query, but its page holds what has come since.
    cursor, snapshot = query.seen or query.cursor, query.snapshot and not query.seen
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
        session.start(
            call.principal, query.device, cursor, snapshot=snapshot, capabilities=query.capabilities.split(",")
        )
        await over
    finally:
        session.gone()
        outlet.on_writable = outlet.on_closed = None
    return response
