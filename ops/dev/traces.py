"""A small OTLP receiver over HTTP, and a page that shows one notification's way, for this machine: `seamark dev --traces`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from gateway.api.dev_page import PAGE_HEADERS, check_local
from gateway.http.problems import Handler, Problem
from ops.dev.spans import SpanStore, decode
from ops.served import served

BODY_BYTES_MAX: Final = 8 << 20
"""Of one request, unpacked: a batch of 512 spans takes some 300 KB."""

_WEB: Final = Path(__file__).with_name("web")
_FILES: Final = {
    "/": ("traces.html", "text/html"),
    "/traces/{trace_id:[0-9a-f]{32}}": ("traces.html", "text/html"),
    "/traces.js": ("traces.js", "text/javascript"),
    "/traces.css": ("traces.css", "text/css"),
}

_encode: Final = msgspec.json.Encoder().encode


@contextlib.asynccontextmanager
async def receiving(host: str, port: int, store: SpanStore | None = None) -> AsyncIterator[str]:
    """Receive spans, and show them, for as long as the block runs; gives the address.

    Args:
        port: 0: chosen by the system.

    Raises:
        OSError: the port is taken.
    """
    async with served(_app(SpanStore() if store is None else store), host, port) as bound:
        yield f"http://{host}:{bound}"


def _app(store: SpanStore) -> web.Application:
    async def receive(request: web.Request) -> web.Response:
        try:
            spans = decode(await request.read())  # unpacked already, where it was packed
        except ValueError as error:
            return web.Response(status=400, text=str(error))
        store.add(spans)
        answer = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=answer, content_type="application/x-protobuf")

    async def overviews(_: web.Request) -> web.Response:
        return web.Response(body=_encode(store.overviews()), content_type="application/json", headers=PAGE_HEADERS)

    async def trace(request: web.Request) -> web.Response:
        found = store.trace(request.match_info["trace_id"])
        return web.Response(body=_encode(found), content_type="application/json", headers=PAGE_HEADERS)

    app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_this_machine_only])
    app.router.add_post("/v1/traces", receive)
    app.router.add_get("/api/traces", overviews)
    app.router.add_get("/api/traces/{trace_id:[0-9a-f]{32}}", trace)
    for path, (name, content_type) in _FILES.items():
        app.router.add_get(path, _static(name, content_type))
    return app


@web.middleware
async def _this_machine_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """As for the page of the gateway: no other site may read the traces. The page itself holds none, and may be linked."""
    if request.path.startswith(("/api/", "/v1/")):
        try:
            check_local(request)
        except Problem as problem:
            return web.Response(status=problem.kind.status, text=problem.detail)
    return await handler(request)


def _static(name: str, content_type: str) -> Handler:
    async def serve(_: web.Request) -> web.StreamResponse:
        body = (_WEB / name).read_bytes()
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=PAGE_HEADERS)

    return serve
