"""The port on which a process says how it is: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from engine.settings import Settings, cannot_listen
from ops.served import served

Answering = Callable[[web.Request], Awaitable[web.Response]]


@contextlib.asynccontextmanager
async def health_port(
    settings: Settings, healthz: Answering, readyz: Answering, metrics: Answering
) -> AsyncIterator[int]:
    """Answer there as long as the block runs; gives the port.

    Raises:
        InvalidSetting: somebody listens there.
    """
    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    async with contextlib.AsyncExitStack() as held:
        try:
            port = await held.enter_async_context(served(app, settings.health_host, settings.health_port))
        except OSError as error:
            raise cannot_listen("health", settings.health_host, settings.health_port, error) from error
        yield port
