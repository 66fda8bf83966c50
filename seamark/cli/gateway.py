"""`seamark gateway`: what devices and services connect to, one process per core on one port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from engine.settings import Settings, load_settings
from seamark.exitcode import MISCONFIGURED

if TYPE_CHECKING:
    from gateway.options import GatewayOptions
    from seamark.process import Health

RESTART_SECONDS = 1.0
POLL_SECONDS = 0.2
STOP_SECONDS_MAX = 25.0


def gateway(
    processes: Annotated[
        int, typer.Option("--processes", help="Processes that share the port; 0: one per core.", min=0)
    ] = 0,
) -> None:
    """Run the gateway."""
    settings = load_settings()
    count = processes or os.cpu_count() or 1
    sys.exit(_serve(settings) if count == 1 else _serve_many(settings, count))


def _serve(settings: Settings) -> int:
    from seamark.process import run_role

    async def work(stop: asyncio.Event, health: Health) -> None:
        from gateway import collector
        from gateway.context import Context
        from gateway.health import not_ready
        from gateway.server import run

        def started(port: int, context: Context) -> None:
            health.not_ready = lambda: not_ready(context)

        collector.tune()
        await run(_options(settings), stop=stop, port=settings.gateway_port, reuse_port=True, started=started)

    return run_role("gateway", settings, work)


def _options(settings: Settings) -> GatewayOptions:
    from gateway.options import GatewayOptions

    return GatewayOptions(
        nats=settings.nats("seamark-gateway"),
        partitions=settings.partitions,
        postgres_url=settings.postgres_url.reveal() if settings.postgres_url else None,
        redis_url=settings.redis_url.reveal(),
        jwt_secret=settings.jwt_secret.reveal() if settings.jwt_secret else None,
        jwks_url=settings.jwks_url,
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        origins=settings.origins,
        host=settings.gateway_host,
        dev=settings.profile == "dev",
        dev_api_key=settings.dev_api_key.reveal() if settings.dev_api_key else None,
        handshakes_per_minute=settings.handshakes_per_minute,
    )


def _serve_many(settings: Settings, count: int) -> int:
    """Parent of `count` processes: a dead one is replaced and that is said, signals are passed on. It serves nothing."""
    import structlog

    from engine.telemetry import configure_logging

    configure_logging("gateway", settings.log_format)
    log = structlog.get_logger("seamark.gateway")
    port = settings.gateway_port or _reserve_port(settings.gateway_host)
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    children = [_spawn(settings, port, number) for number in range(count)]
    while not stopping:
        time.sleep(POLL_SECONDS)
        for number, child in enumerate(children):
            if child.poll() is None or stopping:
                continue
            if child.returncode == MISCONFIGURED:  # the child has said what is wrong
                _end(children)
                return MISCONFIGURED
            log.error("gateway_process_ended", number=number, code=child.returncode, restart_seconds=RESTART_SECONDS)
            time.sleep(RESTART_SECONDS)
            children[number] = _spawn(settings, port, number)
    return _end(children)


def _spawn(settings: Settings, port: int, number: int) -> subprocess.Popen[bytes]:
    from seamark.dev.child import death_signal_setter

    # Ports of their own: the one that is set for the first process, the following ones for the others.
    health_port = settings.health_port + number if settings.health_port else 0
    env = {**os.environ, "SEAMARK_GATEWAY_PORT": str(port), "SEAMARK_HEALTH_PORT": str(health_port)}
    argv = [sys.executable, "-m", "seamark", "gateway", "--processes", "1"]
    return subprocess.Popen(argv, env=env, preexec_fn=death_signal_setter(signal.SIGTERM))  # noqa: PLW1509


def _end(children: list[subprocess.Popen[bytes]]) -> int:
    for child in children:
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS_MAX
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return 0


def _reserve_port(host: str) -> int:
    """A port all children can bind; taken free a moment before they do."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
