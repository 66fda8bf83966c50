"""A role as a process: uvloop, logs, signals, its own health and metrics port, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import structlog
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from engine.errors import BrokerError, InvalidSetting, SeamarkError, TopologyError
from engine.settings import Settings
from engine.telemetry import configure_logging

_log = structlog.get_logger("seamark.process")

STOP_SECONDS_MAX = 20.0
"""From the signal to the end: below the 30 s that orchestrators give before they kill."""

EXIT_FAILED = 1
EXIT_MISCONFIGURED = 78
"""EX_CONFIG of sysexits.h: starting again will not help before somebody changes something."""


@dataclass(slots=True)
class Health:
    """What the health port says. A role replaces `not_ready` once it can tell."""

    not_ready: Callable[[], list[str]] = field(default=lambda: ["starting"])


Work = Callable[[asyncio.Event, Health], Awaitable[None]]
"""`work(stop, health)`: serve until `stop` is set, then end in order."""


def run_role(role: str, settings: Settings, work: Work) -> int:
    """Run `work` until it ends, SIGTERM or SIGINT; the exit code says whether starting again may help."""
    configure_logging(role, settings.log_format)
    try:
        return uvloop.run(_supervise(role, settings, work))
    except (TopologyError, InvalidSetting) as error:
        _log.error("cannot_start", why=str(error))
        return EXIT_MISCONFIGURED
    except SeamarkError as error:
        _log.error("role_failed", why=str(error))
        return EXIT_FAILED


async def _supervise(role: str, settings: Settings, work: Work) -> int:
    stop, health = asyncio.Event(), Health()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    async with _health_port(settings, health) as port:
        _log.info("role_starting", health_port=port)
        worker = asyncio.ensure_future(work(stop, health))
        stopping = asyncio.create_task(stop.wait(), name="stop-signal")
        await asyncio.wait((worker, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if worker.done():
            return _outcome(role, worker, asked=stop.is_set())
        _log.info("role_stopping")
        health.not_ready = lambda: ["stopping"]
        done, _ = await asyncio.wait((worker,), timeout=STOP_SECONDS_MAX)
        if not done:
            _log.warning("role_cut_off", seconds=STOP_SECONDS_MAX)
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            return EXIT_FAILED
        return _outcome(role, worker, asked=True)


def _outcome(role: str, worker: asyncio.Future[None], *, asked: bool) -> int:
    """0 only for an end that was asked for."""
    error = worker.exception()
    if error is not None:
        _reraise(error)
    _log.info("role_stopped" if asked else "role_ended")
    return 0 if asked else EXIT_FAILED


def _reraise(error: BaseException) -> None:
    """Errors of ours as they are, whatever task group they came through; others with their traceback in the log."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, SeamarkError) or isinstance(error, BrokerError):
        _log.error("role_failed", exc_info=error)
    raise error


@contextlib.asynccontextmanager
async def _health_port(settings: Settings, health: Health) -> AsyncIterator[int]:
    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        reasons = health.not_ready()
        body = json.dumps({"status": "not ready" if reasons else "ready", "reasons": reasons})
        return web.Response(text=body, content_type="application/json", status=503 if reasons else 200)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, settings.health_host, settings.health_port)
    try:
        await site.start()
        yield site.port
    finally:
        await runner.cleanup()
