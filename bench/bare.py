"""The yardstick of connections: an aiohttp server that shakes hands over WebSocket and does nothing else."""

import asyncio
import signal
import sys

import uvloop
from aiohttp import web

from bench.machine import raise_file_limit
from bench.processes import say
from ops.collecting import collect_rarely


async def _websocket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(compress=False, protocols=("seamark.v1",))
    await socket.prepare(request)
    async for _ in socket:
        pass
    return socket


async def _main() -> None:
    raise_file_limit()
    collect_rarely()  # as the roles do: the yardstick must not be slow for want of it
    app = web.Application()
    app.router.add_get("/v1/ws", _websocket)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]), backlog=8192, reuse_port=True).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    say("ready")
    await stop.wait()


if __name__ == "__main__":
    uvloop.run(_main())
