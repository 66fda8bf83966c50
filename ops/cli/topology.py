"""`seamark topology`: streams and consumers on the server, held against the files in `nats/`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import TopologyError
from engine.settings import given_settings, load_settings
from ops.cli.output import err, out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, nats_settings, read_dev_file
from seamark.protocol.errors import SeamarkError

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from engine.broker.jetstream import Broker
    from engine.topology.files import Profile
    from engine.topology.repair_plan import RepairPlan
    from engine.topology.size import Sizing

app = typer.Typer(
    help="Streams and consumers: plan, apply, check, restore, repair, render, size, publisher.", no_args_is_help=True
)

ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="dev or production; default: as the roles have it, dev for the development stack of this folder.",
    ),
]
Partitions = Annotated[
    int | None,
    typer.Option("--partitions", help="Fixed for life when the topology is made; default: SEAMARK_PARTITIONS."),
]
Recreate = Annotated[
    bool, typer.Option("--recreate", help="Make streams anew, empty, that existed once and have no backup.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]


@app.command()
def plan(
    profile: ProfileOption = None,
    partitions: Partitions = None,
    recreate: Recreate = False,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show what would have to change on the server; exit code 2 when something is refused."""

    async def work(broker: Broker) -> None:
        from engine.topology import server as topology

        found = await topology.plan(broker, _profile(profile), _partitions(partitions), recreate=recreate)
        _show(found, as_json=as_json)
        if found.refusals:
            raise typer.Exit(2)

    _run(folder, work)


@app.command()
def apply(
    profile: ProfileOption = None,
    partitions: Partitions = None,
    recreate: Recreate = False,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Bring the server in line with the files; loses no data, refuses what would."""

    async def work(broker: Broker) -> None:
        from engine.topology import server as topology

        found = await topology.plan(broker, _profile(profile), _partitions(partitions), recreate=recreate)
        for note in found.notes:
            err.print(f"# {note}", markup=False)
        done = await topology.apply(broker, found)
        if as_json:
            print_json({"done": done, "notes": list(found.notes)})
            return
        for line in done or ["nothing to do"]:
            out.print(line, markup=False)

    _run(folder, work)


@app.command()
def check(
    profile: ProfileOption = None,
    partitions: Partitions = None,
    monitor: Annotated[
        list[str] | None, typer.Option("--monitor", help="Monitoring address of a server; repeat for all.")
    ] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Verify what the server really does; exit code 2 when the profile refuses it."""

    async def work(broker: Broker) -> None:
        from engine.topology import check as topology_check

        found = await topology_check.check(
            broker, _profile(profile), _partitions(partitions), monitor_urls=monitor or _monitors(folder)
        )
        _show(found, as_json=as_json)
        if found.refused:
            raise typer.Exit(2)

    _run(folder, work)


@app.command()
def restore(
    streams: Annotated[
        list[str],
        typer.Argument(
            help="Streams that were restored from a backup: LOG-2, or EVENTS=1000 with the last sequence of its backup "
            "(state.last_seq in backup.json)."
        ),
    ],
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Give restored streams a new epoch, so that no cursor or mark of before is believed."""
    from engine.topology import server as topology

    backups = topology.parse_backups(streams)

    async def work(broker: Broker) -> None:
        rotated = await topology.restore(broker, backups, backups)
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
    from engine.topology import repair as repairs
    from engine.topology.repair_plan import parse_positions

    rule, positions = repairs.claims_rule(claims), parse_positions(at or [])
    found: list[RepairPlan] = []

    async def prepare(broker: Broker) -> None:
        async with _redis(folder) as redis:
            found.append(await repairs.prepare(broker, redis, positions, claims=rule))

    async def carry_out(broker: Broker) -> None:
        async with _redis(folder) as redis:
            done = await repairs.apply(broker, redis, found[0])
        if as_json:
            print_json({"done": done})
        for line in [] if as_json else done:
            err.print(line, markup=False)

    # Not connected while a person reads and thinks: the server would drop a client that answers no pings. What moves
    # meanwhile is noticed: every mark is written only over the one that the plan has seen.
    _run(folder, prepare)
    _show(found[0], as_json=as_json)
    if found[0].refusals:
        raise typer.Exit(2)
    if not found[0].empty:
        if not yes:
            typer.confirm("Do this?", abort=True, err=True)
        _run(folder, carry_out)


@app.command()
def render(
    target: Annotated[Path, typer.Argument(help="Folder to write the files to.")],
    profile: ProfileOption = None,
    partitions: Partitions = None,
    as_json: Json = False,
) -> None:
    """Write the stream and consumer files with all numbers filled in, for `nats stream add --config`."""
    from engine.topology import files as topology_files

    written = topology_files.render(_profile(profile), _partitions(partitions)).write(target)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        out.print(str(path), markup=False)


@app.command()
def publisher(
    tenant: Annotated[str, typer.Argument(help="The tenant whose events this user may publish.")],
    add_to: Annotated[
        Path | None, typer.Option("--add-to", help="Put it into this accounts.conf instead of printing it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the broker's user that may publish the events of one tenant and nothing else."""
    from engine.topology import accounts

    block, user, variable = (
        make(tenant) for make in (accounts.publisher_block, accounts.publisher_user, accounts.publisher_variable)
    )
    if add_to is not None:
        try:
            before = add_to.read_text(encoding="utf-8")
            after = accounts.with_publisher(before, tenant)
            if after != before:
                add_to.write_text(after, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TopologyError(f"{add_to} cannot be changed: {error}", "Name an accounts.conf.") from error
        except TopologyError as error:
            raise TopologyError(f"{add_to}: {error.detail}", error.remedy) from error
    if as_json:
        print_json({"user": user, "password_variable": variable, "inbox_prefix": f"_INBOX_{user}", "block": block})
        return
    if add_to is None:
        out.print(block, end="", markup=False, highlight=False)
    (err if add_to is None else out).print(  # the block alone can be piped into a file
        f"Set {variable} in the environment of every server, then reload it (nats-server --signal reload);"
        f" services of {tenant} connect as {user}.",
        markup=False,
    )


@app.command()
def size(
    rate: Annotated[float, typer.Option("--rate", help="Records a second, on average over all the days.")],
    record_bytes: Annotated[
        int, typer.Option("--record-bytes", help="JSON of a record; its data is most of it.")
    ] = 450,
    days: Annotated[float, typer.Option("--days", help="How long logs and receipts are kept.")] = 30.0,
    event_bytes: Annotated[
        int | None, typer.Option("--event-bytes", help="JSON of an event; default: as a record.")
    ] = None,
    receipts_per_record: Annotated[
        float, typer.Option("--receipts-per-record", help="Receipts for each record; more with several devices.")
    ] = 1.0,
    users: Annotated[int, typer.Option("--users", help="Users with a record within these days.")] = 1_000_000,
    servers: Annotated[int, typer.Option("--servers", help="Servers of the cluster.")] = 3,
    partitions: Annotated[
        int | None, typer.Option("--partitions", help="Fixed for life; default: as many as the sizes ask for.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Write the files of nats/ with these sizes to this folder (SEAMARK_NATS_FILES)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute what a rate needs: streams, partitions, consumers, memory, disk; --write makes the production files fit."""
    from engine.topology import size as topology_size

    demand = topology_size.Demand(
        rate, record_bytes, days, event_bytes, receipts_per_record, users, servers, _partitions(partitions)
    )
    found = topology_size.size(demand)
    written = [] if write is None else topology_size.write(found, write)
    if as_json:
        print_json(found.to_json() | {"written": [str(path) for path in written]})
        return
    _show_sizes(found)
    for path in written:
        out.print(f"wrote {path}", markup=False)
    if write is not None:
        out.print(f"Use them with SEAMARK_NATS_FILES={write}, SEAMARK_PARTITIONS={found.partitions}.", markup=False)


def _show_sizes(found: Sizing) -> None:
    from rich.table import Table

    demand = found.demand
    out.print(f"{demand.rate:g} records/s of {demand.record_bytes} B on average, kept for {demand.days:g} days:")
    table = Table("stream", "number", "stored in each", "max_bytes of each", "kept", box=None, pad_edge=False)
    for each in found.streams:
        kept = f"{each.max_age_days:g} d" if each.max_age_days else "for ever"
        table.add_row(each.name, str(each.count), _gib(each.stored_bytes), _gib(each.max_bytes), kept)
    out.print(table)
    out.print()
    for name, value in (
        ("partitions", f"{found.partitions}"),
        ("consumers", f"{found.consumers} durables"),
        ("max_file_store", f"{found.max_file_store >> 30}GB on each of {demand.servers} servers"),
        ("disk", f"{_gib(found.disk_bytes)} on each, {_gib(found.disk_bytes * demand.servers)} in all"),
        ("memory", f"{_gib(found.memory_bytes)} on each for subjects, message ids and consumers"),
    ):
        out.print(f"{name:<16}{value}")
    out.print()
    for each in found.streams:
        out.print(f"- {each.name}: {each.why}", markup=False)
    for reason in found.reasons:
        out.print(f"- {reason}", markup=False)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


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


def _profile(name: str | None) -> Profile:
    """What was asked for, else what the roles run with: the settings' where they give a broker or the profile itself."""
    from engine.topology.files import PROFILES

    if name is None:
        name = load_settings().profile if {"nats_url", "profile"} & given_settings() else "dev"
    for profile in PROFILES:
        if profile == name:
            return profile
    raise TopologyError(f"unknown profile {name!r}", f"Choose one of {', '.join(PROFILES)}.")


def _partitions(number: int | None) -> int | None:
    return load_settings().partitions if number is None else number


def _run(folder: Path, work: Callable[[Broker], Awaitable[None]]) -> None:
    import uvloop

    async def connected() -> None:
        from engine.broker.jetstream import connect

        broker = await connect(nats_settings(folder, "seamark-topology"))
        try:
            await work(broker)
        finally:
            await broker.close()

    uvloop.run(connected())


@contextlib.asynccontextmanager
async def _redis(folder: Path) -> AsyncIterator[Redis]:
    """The store of the claims of that broker: the settings' where they give either of them, else the stack's.

    Raises:
        SeamarkError: in the body, for a Redis that does not answer.
    """
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    named = {"redis_url", "nats_url"} & given_settings()
    url = load_settings().redis_url.reveal() if named else read_dev_file(folder).redis_url
    try:
        async with Redis.from_url(url, socket_connect_timeout=2, socket_timeout=None) as redis:
            yield redis
    except (RedisError, TimeoutError, OSError) as error:
        why = str(error) or type(error).__name__
        remedy = "Start it or set SEAMARK_REDIS_URL, then run the repair again; --claims none leaves Redis alone"
        raise SeamarkError(f"Redis, which keeps the claims, does not do what is asked: {why}. {remedy}") from error
