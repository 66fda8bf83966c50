"""Cross-origin requests of allowed pages: what a browser needs to be told before it sends a token (Fetch, section 3.2)."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from gateway.context import CONTEXT
from gateway.http.problems import Handler

_HEADERS: Final = "Authorization, Content-Type, Last-Event-ID, Idempotency-Key, traceparent, tracestate"
_MAX_AGE_SECONDS: Final = 600


@web.middleware
async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer whether a page of this origin may send its request; no credentials of the browser are ever allowed."""
    if request.method != "OPTIONS" or not request.path.startswith("/v1/"):
        return await handler(request)
    if not request.app[CONTEXT].origins.allows(request.headers.get("Origin"), request.headers.get("Host")):
        return web.Response(status=403)
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": _HEADERS,
            "Access-Control-Max-Age": str(_MAX_AGE_SECONDS),
        },
    )


async def allow(request: web.Request, response: web.StreamResponse) -> None:
    """Name the origin in the answer to it, if it is on the list; and do not tell the versions we run on."""
    response.headers["Server"] = "seamark"
    origin = request.headers.get("Origin")
    if origin is not None and request.app[CONTEXT].origins.allows(origin, request.headers.get("Host")):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        response.headers.add("Vary", "Origin")
