"""Cross-origin requests of allowed pages: what a browser needs to be told before it sends a token (Fetch, section 3.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from aiohttp import web

from gateway.context import CONTEXT
from gateway.http.endpoint import Endpoint
from gateway.http.idempotency import REPLAYED
from gateway.http.problems import REQUEST_ID, Handler, request_id

_HEADERS: Final = ("Authorization", "Content-Type", REQUEST_ID, "traceparent", "tracestate")
"""What any request may carry."""

_MAX_AGE_SECONDS: Final = 600


def preflights(endpoints: Iterable[Endpoint]) -> list[web.RouteDef]:
    """The routes that tell whether a page of some origin may send its request; no credentials of the browser are ever allowed."""
    paths: dict[str, list[Endpoint]] = defaultdict(list)
    for one in endpoints:
        paths[one.route().path].append(one)
    return [web.options(path, _preflight(together)) for path, together in paths.items()]


def _preflight(endpoints: list[Endpoint]) -> Handler:
    declared = [name for one in endpoints for name, place in one.parameters.items() if place == "header"]
    said = {
        "Access-Control-Allow-Methods": ", ".join(one.method for one in endpoints),
        "Access-Control-Allow-Headers": ", ".join(dict.fromkeys((*_HEADERS, *declared))),
        "Access-Control-Max-Age": str(_MAX_AGE_SECONDS),
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        allowed = request.app[CONTEXT].origins.allows(request.headers.get("Origin"), request.headers.get("Host"))
        return web.Response(status=204, headers=said) if allowed else web.Response(status=403)

    return answer


async def allow(request: web.Request, response: web.StreamResponse) -> None:
    """Add the request's id and, if it is allowed, the request's origin; hide the versions of the software we run on."""
    response.headers["Server"] = "seamark"
    response.headers[REQUEST_ID] = request_id(request)
    origin = request.headers.get("Origin")
    if origin is not None and request.app[CONTEXT].origins.allows(origin, request.headers.get("Host")):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = f"Retry-After, {REQUEST_ID}, {REPLAYED}"
        response.headers.add("Vary", "Origin")
