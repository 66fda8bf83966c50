"""`seamark gateway`: what devices and services connect to, one process per core on one port."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from engine.settings import Settings, cannot_listen, load_settings

if TYPE_CHECKING:
    from gateway.options import GatewayOptions
    from ops.process import Health

SHARED_VARIABLE = "SEAMARK_GATEWAY_PORT_SHARED"
"""Set for processes that share their port with others. Nobody else may: the kernel would give half of the connections to
whatever else listens there, such as another stack, and nobody would be told."""


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
    from ops.process import run_role

    async def work(stop: asyncio.Event, health: Health) -> None:
        from gateway import collector, descriptors
        from gateway.context import Context
        from gateway.health import not_ready
        from gateway.server import run
        from ops.siblings import say_up

        def started(port: int, context: Context) -> None:
            health.not_ready = lambda: not_ready(context)
            say_up()

        collector.tune()
        descriptors.raise_limit()
        shared = bool(os.environ.get(SHARED_VARIABLE))
        await run(_options(settings), stop=stop, port=settings.gateway_port, reuse_port=shared, started=started)

    return run_role("gateway", settings, work)


def _options(settings: Settings) -> GatewayOptions:
    from engine.directory.sealing import seal_of
    from gateway.options import GatewayOptions

    return GatewayOptions(
        nats=settings.nats("seamark-gateway"),
        nats_monitor_urls=settings.nats_monitor_urls,
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
        dev_outbox_url=settings.dev_outbox_url,
        handshakes_per_minute=settings.handshakes_per_minute,
        trusted_proxies=settings.trusted_proxies,
        unsubscribe_secrets=tuple(settings.unsubscribe_secrets.reveal().split())
        if settings.unsubscribe_secrets
        else (),
        seal=seal_of(settings),
        providers=settings.providers,
        tenant_state_percent=settings.tenant_state_percent,
        trace_url=settings.trace_url,
    )


def _serve_many(settings: Settings, count: int) -> int:
    """Parent of `count` processes on one port; it serves nothing but their health."""
    from engine.telemetry import configure_logging
    from ops.commonport import common_port
    from ops.siblings import environment_with, run_siblings

    configure_logging("gateway", settings.log_format)
    port = _free_port(settings.gateway_host, settings.gateway_port)
    argv = [sys.executable, "-m", "ops", "gateway", "--processes", "1"]
    shared = {"SEAMARK_GATEWAY_PORT": str(port), SHARED_VARIABLE: "1"}
    with common_port(settings, count) as ports:
        environments = [environment_with(SEAMARK_HEALTH_PORT=str(one), **shared) for one in ports]
        return run_siblings("gateway", argv, environments)


def _free_port(host: str, port: int) -> int:
    """A port that nobody listens on: the one that is set, or one for 0. Taken free a moment before the children bind it.

    Raises:
        InvalidSetting: somebody listens there. The children, who share the port, would not notice.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                port = port or int(probe.getsockname()[1])
    except OSError as error:
        raise cannot_listen("gateway", host, port, error) from error
    return port
