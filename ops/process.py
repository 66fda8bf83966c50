"""A role as a process: uvloop, logs, signals, its own health and metrics port, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.asyncio import Redis

from engine import metrics
from engine.broker.health import watched
from engine.broker.jetstream import Broker, connect
from engine.errors import BrokerError, InvalidSetting
from engine.settings import Settings
from engine.telemetry import configure_logging, identity_of
from engine.topology.check import report_start
from ops.collecting import collect_rarely
from ops.exitcode import FAILED, MISCONFIGURED, exit_code_of
from ops.healthport import health_port
from seamark.protocol.errors import SeamarkError

if TYPE_CHECKING:
    from engine.postgres import Pool

_log = structlog.get_logger("seamark.process")

STOP_SECONDS_MAX = 20.0
"""From the signal to the end: below the 30 s that orchestrators give before they kill."""

CLEAN_UP_SECONDS_MAX = 2.0
"""What a role that is cut off may still take for its clean-up."""

DATABASE_CONNECT_SECONDS = 5.0
DATABASE_STATEMENT_SECONDS = 60.0
"""The longest statement of a role is the fold of a large batch."""


NO_EXPORTER = "SEAMARK_TRACES_ENDPOINT is set and no exporter is installed: pip install 'seamark-server[traces]'"


@dataclass(slots=True)
class Health:
    """What the health port says. A role replaces `not_ready` once it can tell."""

    not_ready: Callable[[], list[str]] = field(default=lambda: ["starting"])

    def also(self, not_ready: Callable[[], list[str]]) -> None:
        """Be not ready for these reasons, too."""
        before = self.not_ready
        self.not_ready = lambda: [*before(), *not_ready()]


Work = Callable[[asyncio.Event, Health], Coroutine[Any, Any, None]]
"""`work(stop, health)`: serve until `stop` is set, then end in order."""


def run_role(role: str, settings: Settings, work: Work, *, stop_seconds_max: float = STOP_SECONDS_MAX) -> int:
    """Run `work` until it ends, SIGTERM or SIGINT; the exit code says whether starting again may help.

    Returns:
        0 after an end that was asked for, 1 when the work failed, ended by itself or had to be cut off,
        78 when settings or streams have to be changed first.
    """
    configure_logging(role, settings.log_format)
    metrics.target.info({name.replace(".", "_"): value for name, value in identity_of(role).items()})
    collect_rarely()
    try:
        with _traces(role, settings):
            return uvloop.run(_to_the_end(_supervise(role, settings, work, stop_seconds_max)))
    except InvalidSetting as error:  # of the health port or the traces: nothing of the role has run yet
        _log.error("cannot_start", why=str(error))
        return MISCONFIGURED


def _traces(role: str, settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Export spans, where that is wanted: else nothing of it is loaded."""
    held = contextlib.ExitStack()
    if settings.traces_endpoint is not None:
        try:
            from engine.traces.export import exporting

            held.enter_context(exporting(settings, identity_of(role)))
        except ImportError as error:
            raise InvalidSetting(NO_EXPORTER) from error
    return held


@contextlib.asynccontextmanager
async def stores(role: str, settings: Settings, health: Health) -> AsyncIterator[tuple[Broker, Redis]]:
    """What a role works with that serves no clients. From now on its health is that of the broker.

    Raises:
        Unavailable: no broker.
    """
    broker = await connect(settings.nats(f"seamark-{role}"))
    try:
        async with (
            Redis.from_url(settings.redis_url.reveal(), socket_connect_timeout=2, socket_timeout=None) as redis,
            watched(broker, settings.nats_monitor_urls) as broker_health,
        ):
            health.not_ready = broker_health.not_ready
            await report_start(broker, settings.profile, settings.nats_monitor_urls)
            yield broker, redis
    finally:
        await broker.close()


@contextlib.asynccontextmanager
async def database(settings: Settings, connections: int, what_for: str) -> AsyncIterator[Pool]:
    """PostgreSQL for a role that needs it, connected when it is first asked.

    Args:
        what_for: why the role needs it, for whoever has not set its address.

    Raises:
        InvalidSetting: no address is set.
    """
    from engine.postgres import lazy_pool  # a dispatcher has nothing to do with PostgreSQL

    if settings.postgres_url is None:
        raise InvalidSetting(f"SEAMARK_POSTGRES_URL is not set: {what_for}")
    pool = await lazy_pool(
        settings.postgres_url.reveal(),
        connections,
        connect_seconds=DATABASE_CONNECT_SECONDS,
        statement_seconds=DATABASE_STATEMENT_SECONDS,
    )
    try:
        yield pool
    finally:
        pool.terminate()


async def _to_the_end(supervised: Coroutine[Any, Any, int]) -> int:
    """The exit code; the process ends with it soon, even if a task that was left over does not."""
    code = await supervised
    # The loop waits for every task it cancels, and libraries may lose a cancellation: nats-py, as it reconnects.
    last_resort = threading.Timer(CLEAN_UP_SECONDS_MAX, _leave, (code,))
    last_resort.daemon = True
    last_resort.start()
    return code


def _leave(code: int) -> None:
    _log.warning("role_left_tasks_behind", seconds=CLEAN_UP_SECONDS_MAX)
    os._exit(code)


async def _supervise(role: str, settings: Settings, work: Work, stop_seconds_max: float) -> int:
    stop, health = asyncio.Event(), Health()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    async with _health_of(settings, health) as port:
        _log.info("role_starting", health_port=port)
        worker = asyncio.create_task(work(stop, health), name=role)
        stopping = asyncio.create_task(stop.wait(), name="stop-signal")
        await asyncio.wait((worker, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if worker.done():
            return _outcome(worker, asked=stop.is_set())
        _log.info("role_stopping")
        health.not_ready = lambda: ["stopping"]
        done, _ = await asyncio.wait((worker,), timeout=stop_seconds_max)
        if not done:
            _log.warning("role_cut_off", seconds=stop_seconds_max)
            worker.cancel()
            await asyncio.wait((worker,), timeout=CLEAN_UP_SECONDS_MAX)
            return FAILED
        return _outcome(worker, asked=True)


def _outcome(worker: asyncio.Future[None], *, asked: bool) -> int:
    """One log line, and 0 only for an end that was asked for."""
    error: BaseException | None = asyncio.CancelledError() if worker.cancelled() else worker.exception()
    while isinstance(error, BaseExceptionGroup):  # the first failure stopped the others of its task group
        error = error.exceptions[0]
    if error is None:
        _log.info("role_stopped" if asked else "role_ended")
        return 0 if asked else FAILED
    code = exit_code_of(error)
    if code == MISCONFIGURED:
        _log.error("cannot_go_on", why=str(error))
    elif isinstance(error, SeamarkError) and not isinstance(error, BrokerError):
        _log.error("role_failed", why=str(error))
    else:
        _log.error("role_failed", why=repr(error), exc_info=error)
    return code


@contextlib.asynccontextmanager
async def _health_of(settings: Settings, health: Health) -> AsyncIterator[int]:
    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        reasons = health.not_ready()
        body = json.dumps({"status": "not ready" if reasons else "ready", "reasons": reasons})
        return web.Response(text=body, content_type="application/json", status=503 if reasons else 200)

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async with health_port(settings, healthz, readyz, exposition) as port:
        yield port
