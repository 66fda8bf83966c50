"""An application of aiohttp that answers for as long as a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

END_SECONDS: Final = 1.0
"""How long answers that are under way may still take at the end: all who ask are on this machine, or ask again."""


@contextlib.asynccontextmanager
async def served(app: web.Application, host: str, port: int) -> AsyncIterator[int]:
    """Serve it; gives the port.

    Args:
        port: 0: chosen by the system.

    Raises:
        OSError: the port is taken.
    """
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=END_SECONDS)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
        yield site.port
    finally:
        await runner.cleanup()
