"""`seamark worker`: the role that sends what was decided, by push, mail, SMS and webhook."""

from __future__ import annotations

import asyncio
import functools
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from engine.settings import Settings, load_settings

if TYPE_CHECKING:
    from engine.plan.rules import Channel
    from ops.process import Health

POOL_CONNECTIONS_MAX = 16
"""Addresses, templates and profiles that are read at once; more of them wait for a connection."""

STOP_SECONDS_MAX = 40.0
"""From the signal to the end: what is being sent is waited for. Whoever ends the process has to give it 45 s."""

TOGETHER_SECONDS_MAX = STOP_SECONDS_MAX + 3.0
"""The same for several processes: one that was ended while it sends would leave it in doubt what its provider has taken."""


def worker(
    channel: Annotated[
        list[str] | None,
        typer.Option(
            "--channel", help="A channel to serve; several times for several. Default: all that the file names."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, max=64, help="Processes of this worker; one uses one core.")
    ] = 1,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only look whether the file of providers and the secrets it names can be used."),
    ] = False,
) -> None:
    """Run a worker. Start as many as are needed: they share the jobs, and what providers allow."""
    from engine.worker.providers import read_providers

    settings = load_settings()
    file = read_providers(settings.providers)
    channels = chosen(channel, file.named)
    if check:
        asyncio.run(_check(settings, channels))
        return
    if processes > 1:
        sys.exit(_siblings(settings, channels, processes))
    from ops.process import run_role

    role = functools.partial(_work, settings, channels)
    sys.exit(run_role("worker", settings, role, stop_seconds_max=STOP_SECONDS_MAX))


def chosen(asked: list[str] | None, named: tuple[Channel, ...]) -> tuple[Channel, ...]:
    """The channels to serve.

    Raises:
        InvalidSetting: there is no such channel, or none at all.
    """
    from engine.errors import InvalidSetting
    from engine.worker.providers import SENT_BY_WORKERS

    unknown = [one for one in asked or () if one not in SENT_BY_WORKERS]
    if unknown:
        raise InvalidSetting(
            f"--channel {unknown[0]}: there is no such channel; there are {', '.join(SENT_BY_WORKERS)}"
        )
    found = tuple(one for one in SENT_BY_WORKERS if one in (asked or named))
    if not found:
        raise InvalidSetting("the file of providers names no channel: write a table, such as [email]")
    return found


async def _check(settings: Settings, channels: tuple[Channel, ...]) -> None:
    from engine.directory.sealing import seal_of
    from engine.worker.providers import Providers, read_providers
    from ops.working import unset

    async def forget(_: int) -> None:
        return

    seal_of(settings)
    providers = Providers(read_providers(settings.providers), channels, forget)
    for channel in channels:
        names = ", ".join(one.name for one in providers.of(channel))
        typer.echo(f"{channel}: {names}")
        for one in providers.of(channel):
            if one.platform == "apns" and not one.apps:
                # Apple may then be asked for whatever app a user has registered a token for, and calls our key wrong.
                typer.echo(
                    f"push.{one.name}: name its `apps`, so that no token of another app is sent to Apple", err=True
                )
    for variable, missing in unset(settings, channels):
        typer.echo(f"{variable} is not set: {missing}", err=True)
    await providers.close()


def _siblings(settings: Settings, channels: tuple[Channel, ...], processes: int) -> int:
    from engine.telemetry import configure_logging
    from ops.commonport import common_port
    from ops.siblings import environment_with, run_siblings

    configure_logging("worker", settings.log_format)
    words = [word for channel in channels for word in ("--channel", channel)]
    with common_port(settings, processes) as ports:
        environments = [environment_with(SEAMARK_HEALTH_PORT=str(one)) for one in ports]
        argv = [sys.executable, "-m", "ops", "worker", *words]
        return run_siblings("worker", argv, environments, stop_seconds_max=TOGETHER_SECONDS_MAX)


async def _work(settings: Settings, channels: tuple[Channel, ...], stop: asyncio.Event, health: Health) -> None:
    import structlog

    from engine.cancels import watching
    from engine.closing import Held
    from engine.controls.watching import watched_controls
    from engine.tasks import run_until
    from ops.process import database, stores
    from ops.siblings import say_up
    from ops.working import Parts, unset, working

    for variable, missing in unset(settings, channels):
        structlog.get_logger("seamark.worker").warning("setting_missing", variable=variable, so=missing)
    async with (
        database(settings, POOL_CONNECTIONS_MAX, "workers read addresses, templates and rules there") as pool,
        stores("worker", settings, health) as (broker, redis),
        watched_controls(broker) as controls,
        watching(broker) as cancels,
        Held() as held,
    ):
        health.also(controls.not_ready)
        parts = Parts(settings, broker, redis, pool, controls, cancels)
        work = await working(parts, channels, held)
        say_up()
        await run_until(stop, work, name="worker")
