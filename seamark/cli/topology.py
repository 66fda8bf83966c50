"""`seamark topology`: streams and consumers on the server, held against the files in `nats/`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import TopologyError
from engine.settings import given_settings, load_settings
from seamark.cli.output import err, out, print_json
from seamark.cli.target import DATA_FOLDER, Folder, Json, nats_settings, read_dev_file

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from engine.jetstream import Broker
    from engine.topology_files import Profile

app = typer.Typer(help="Streams and consumers: plan, apply, check, restore, repair, render.", no_args_is_help=True)

ProfileOption = Annotated[str, typer.Option("--profile", help="dev or production.", envvar="SEAMARK_PROFILE")]
Partitions = Annotated[int | None, typer.Option("--partitions", help="Fixed for life when the topology is made.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]


@app.command()
def plan(
    profile: ProfileOption = "dev", partitions: Partitions = None, folder: Folder = DATA_FOLDER, as_json: Json = False
) -> None:
    """Show what would have to change on the server; exit code 2 when something is refused."""

    async def work(broker: Broker) -> None:
        from engine import topology

        found = await topology.plan(broker, _profile(profile), partitions)
        _show(found, as_json=as_json)
        if found.refusals:
            raise typer.Exit(2)

    _run(folder, work)


@app.command()
def apply(
    profile: ProfileOption = "dev", partitions: Partitions = None, folder: Folder = DATA_FOLDER, as_json: Json = False
) -> None:
    """Bring the server in line with the files; loses no data, refuses what would."""

    async def work(broker: Broker) -> None:
        from engine import topology

        done = await topology.ensure(broker, _profile(profile), partitions)
        if as_json:
            print_json({"done": done})
            return
        for line in done or ["nothing to do"]:
            out.print(line, markup=False)

    _run(folder, work)


@app.command()
def check(
    profile: ProfileOption = "dev",
    partitions: Partitions = None,
    monitor: Annotated[
        list[str] | None, typer.Option("--monitor", help="Monitoring address of a server; repeat for all.")
    ] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Verify what the server really does; exit code 2 when the profile refuses it."""

    async def work(broker: Broker) -> None:
        from engine import topology_check

        found = await topology_check.check(
            broker, _profile(profile), partitions, monitor_urls=monitor or _monitors(folder)
        )
        _show(found, as_json=as_json)
        if found.refused:
            raise typer.Exit(2)

    _run(folder, work)


@app.command()
def restore(
    streams: Annotated[list[str], typer.Argument(help="Streams that were restored from a backup.")],
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Give restored streams a new epoch, so that no cursor or mark of before is believed."""

    async def work(broker: Broker) -> None:
        from engine import topology

        rotated = await topology.restore(broker, streams)
        if as_json:
            print_json({name: {"before": old, "after": new} for name, (old, new) in rotated.items()})
            return
        for name, (old, new) in rotated.items():
            out.print(f"{name}: epoch {old} → {new}")
        err.print("Now run `seamark topology repair` with the dispatchers stopped.")

    _run(folder, work)


@app.command()
def repair(
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="Position: first, last, mark or a sequence; 3=… for one partition. Repeat."),
    ] = None,
    claims: Annotated[
        str,
        typer.Option(
            "--claims",
            help="Claims to forget: replayed (of restored events that are dispatched again), all (the logs are lost too), none.",
        ),
    ] = "replayed",
    yes: Yes = False,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Rewrite the dispatchers' positions for the streams as they are now. Shows what it will do first."""

    async def work(broker: Broker) -> None:
        from engine import repair as repairs
        from engine.repair_plan import parse_positions

        async with _redis(folder) as redis:
            rule = repairs.claims_rule(claims)
            found = await repairs.prepare(broker, redis, parse_positions(at or []), claims=rule)
            _show(found, as_json=as_json)
            if found.refusals:
                raise typer.Exit(2)
            if found.empty or not (yes or typer.confirm("Do this?", err=True)):
                return
            for line in await repairs.apply(broker, redis, found):
                err.print(line, markup=False)

    _run(folder, work)


@app.command()
def render(
    target: Annotated[Path, typer.Argument(help="Folder to write the files to.")],
    profile: ProfileOption = "dev",
    partitions: Partitions = None,
    as_json: Json = False,
) -> None:
    """Write the stream and consumer files with all numbers filled in, for `nats stream add --config`."""
    from engine import topology_files

    written = topology_files.render(_profile(profile), partitions).write(target)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        out.print(str(path), markup=False)


def _monitors(folder: Path) -> list[str]:
    """Monitoring addresses: those of the settings where they give a broker, else the development stack's."""
    given = given_settings()
    if "nats_monitor_urls" in given or "nats_url" in given:
        return list(load_settings().nats_monitor_urls)
    url = read_dev_file(folder).nats_monitor_url
    return [url] if url else []


def _show(found: Any, *, as_json: bool) -> None:
    """A plan or findings: lines for people, an object for machines."""
    if as_json:
        print_json(found.to_json())
        return
    lines = found.lines() if callable(found.lines) else found.lines
    for line in lines or ["nothing to do"]:
        out.print(line, markup=False)


def _profile(name: str) -> Profile:
    from engine.topology_files import PROFILES

    for profile in PROFILES:
        if profile == name:
            return profile
    raise TopologyError(f"unknown profile {name!r}", f"Choose one of {', '.join(PROFILES)}.")


def _run(folder: Path, work: Callable[[Broker], Awaitable[None]]) -> None:
    import uvloop

    async def connected() -> None:
        from engine.jetstream import connect

        broker = await connect(nats_settings(folder, "seamark-topology"))
        try:
            await work(broker)
        finally:
            await broker.close()

    uvloop.run(connected())


@contextlib.asynccontextmanager
async def _redis(folder: Path) -> AsyncIterator[Redis]:
    from redis.asyncio import Redis

    named = "redis_url" in given_settings()
    url = load_settings().redis_url.reveal() if named else read_dev_file(folder).redis_url
    async with Redis.from_url(url, socket_connect_timeout=2, socket_timeout=None) as redis:
        yield redis
