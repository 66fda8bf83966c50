"""The port on which a process says how it is: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from engine.settings import Settings, cannot_listen

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
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, settings.health_host, settings.health_port)
    try:
        try:
            await site.start()
        except OSError as error:
            raise cannot_listen("health", settings.health_host, settings.health_port, error) from error
        yield site.port
    finally:
        await runner.cleanup()
