"""`seamark topology`: streams and consumers on the server, held against the files in `nats/`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer

from engine.errors import TopologyError
from engine.settings import given_settings, load_settings
from engine.topology.files import Profile, profile_named
from ops.cli.output import err, out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, nats_settings, read_dev_file
from seamark.protocol.errors import SeamarkError

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from engine.broker.jetstream import Broker
    from engine.topology.plan import Plan
    from engine.topology.size import Sizing, StreamSize

Outcome = TypeVar("Outcome")

app = typer.Typer(
    help="Streams and consumers: plan, apply, check, restore, repair, render, size, publisher.", no_args_is_help=True
)

ProfileOption = Annotated[
    str | None, typer.Option(help="dev or production; default: as the roles have it, dev for this folder's stack.")
]
Partitions = Annotated[
    int | None, typer.Option(help="Fixed for life when the topology is made; default: SEAMARK_PARTITIONS.")
]
Recreate = Annotated[
    bool, typer.Option("--recreate", help="Make streams anew, empty, that existed once and have no backup.")
]


@app.command()
def plan(
    profile: ProfileOption = None,
    partitions: Partitions = None,
    recreate: Recreate = False,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show what would have to change on the server; exit code 2 when something is refused."""
    from engine.topology import server as topology

    async def work(broker: Broker) -> Plan:
        return await topology.plan(broker, _profile(profile), _partitions(partitions), recreate=recreate)

    found = _run(folder, work)
    _show(found, found.lines(), as_json=as_json)
    if found.refusals:
        raise typer.Exit(2)


@app.command()
def apply(
    profile: ProfileOption = None,
    partitions: Partitions = None,
    recreate: Recreate = False,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Bring the server in line with the files; loses no data, refuses what would."""
    from engine.topology import server as topology

    async def work(broker: Broker) -> tuple[list[str], tuple[str, ...]]:
        found = await topology.plan(broker, _profile(profile), _partitions(partitions), recreate=recreate)
        for note in found.notes:
            err.print(f"# {note}", markup=False)
        return await topology.apply(broker, found), found.notes

    done, notes = _run(folder, work)
    _show({"done": done, "notes": notes}, done or ["nothing to do"], as_json=as_json)


@app.command()
def check(
    profile: ProfileOption = None,
    partitions: Partitions = None,
    monitor: Annotated[list[str] | None, typer.Option(help="Monitoring address of a server; repeat for all.")] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Verify what the server really does; exit code 2 when the profile refuses it."""
    from engine.topology import check as checks

    urls = monitor or _monitors(folder)

    async def work(broker: Broker) -> checks.Findings:
        return await checks.check(broker, _profile(profile), _partitions(partitions), monitor_urls=urls)

    found = _run(folder, work)
    _show(found, found.lines(), as_json=as_json)
    if found.refused:
        raise typer.Exit(2)


@app.command()
def restore(
    streams: Annotated[
        list[str],
        typer.Argument(
            help="LOG-2, or EVENTS=1000 with the last sequence of its backup (state.last_seq in backup.json)."
        ),
    ],
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Give restored streams a new epoch: devices get a reset, and dispatchers go on from where the backup ended."""
    from engine.topology import server as topology

    backups = topology.parse_backups(streams)
    rotated = _run(folder, lambda broker: topology.restore(broker, backups, backups))
    told = {name: {"before": old, "after": new} for name, (old, new) in rotated.items()}
    _show(told, [f"{name}: epoch {old} → {new}" for name, (old, new) in rotated.items()], as_json=as_json)
    err.print("Dispatchers go on by themselves. Rebuild the projections of these streams.")
    for name in (name for name in rotated if name.startswith("LOG-")):
        err.print(
            f"What events of other partitions had added to {name} since its backup is missing. It comes back only if you name an"
            " earlier position for those partitions (seamark topology repair), and other logs get it twice then."
        )


@app.command()
def repair(
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="Position: first, last, mark or a sequence; 3=… for one partition; BULK:… for another source than EVENTS."
        ),
    ] = None,
    forget_claims: Annotated[
        bool, typer.Option("--forget-claims", help="EVENTS and the logs are lost: let services publish all again.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it without asking.")] = False,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Write the dispatchers' positions where they cannot tell them by themselves. Shows what it will do first."""
    from engine.topology import repair as repairs
    from engine.topology.repair_plan import parse_positions

    positions = parse_positions(at or [])

    async def carry_out(broker: Broker) -> list[str]:
        if not forget_claims:
            return await repairs.apply(broker, found)
        async with _redis(folder) as redis:
            return await repairs.apply(broker, found, redis)

    # Not connected while a person reads and thinks: the server would drop a client that answers no pings. What moves
    # meanwhile is noticed: every mark is written only over the one that the plan has seen.
    found = _run(folder, lambda broker: repairs.prepare(broker, positions, forget_claims=forget_claims))
    _show(found, found.lines(), as_json=as_json)
    if found.refusals:
        raise typer.Exit(2)
    if found.empty:
        return
    if not yes:
        typer.confirm("Do this?", abort=True, err=True)
    done = _run(folder, carry_out)
    if as_json:
        print_json({"done": done})
    for line in [] if as_json else done:
        err.print(line, markup=False)


@app.command()
def render(
    target: Annotated[Path, typer.Argument(help="Folder to write the files to.")],
    profile: ProfileOption = None,
    partitions: Partitions = None,
    as_json: Json = False,
) -> None:
    """Write the stream and consumer files with all numbers filled in, for `nats stream add --config`."""
    from engine.topology import files

    written = [str(path) for path in files.render(_profile(profile), _partitions(partitions)).write(target)]
    _show(written, written, as_json=as_json)


@app.command()
def publisher(
    tenant: Annotated[str, typer.Argument(help="The tenant whose events this user may publish.")],
    add_to: Annotated[Path | None, typer.Option(help="Put it into this accounts.conf instead of printing it.")] = None,
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
    rate: Annotated[float, typer.Option(help="Records a second, on average over all the days.")],
    record_bytes: Annotated[int, typer.Option(help="JSON of a record; its data is most of it.")] = 450,
    days: Annotated[float, typer.Option(help="How long logs and receipts are kept.")] = 30.0,
    event_bytes: Annotated[
        int | None, typer.Option(help="JSON of an event, for one user; default: as a record.")
    ] = None,
    receipts_per_record: Annotated[float, typer.Option(help="Receipts for a record; more with several devices.")] = 1.0,
    planned_share: Annotated[
        float, typer.Option(help="Which part of the records goes further than the app, 0 to 1.")
    ] = 0.0,
    users: Annotated[int, typer.Option(help="Users with a record within these days.")] = 1_000_000,
    servers: Annotated[int, typer.Option(help="Servers of the cluster.")] = 3,
    partitions: Annotated[
        int | None, typer.Option(help="Fixed for life; default: as many as the sizes ask for.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write nats/ with these sizes here, for SEAMARK_NATS_FILES.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute what a rate needs: streams, partitions, consumers, memory, disk; --write makes the production files fit."""
    from engine.topology import size as sizes

    demand = sizes.Demand(
        rate,
        record_bytes,
        days,
        event_bytes,
        receipts_per_record,
        planned_share,
        users,
        servers,
        _partitions(partitions),
    )
    found = sizes.size(demand)
    written = [] if write is None else [str(path) for path in sizes.write(found, write)]
    if as_json:
        print_json(msgspec.to_builtins(found) | {"written": written})
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
        table.add_row(each.name, str(each.count), _gib(each.stored_bytes), _bound(each), kept)
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
    for line in (*(f"{each.name}: {each.why}" for each in found.streams), *found.reasons):
        out.print(f"- {line}", markup=False)


def _bound(each: StreamSize) -> str:
    return _gib(each.max_bytes) if each.max_bytes else "none"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def _monitors(folder: Path) -> list[str]:
    """Monitoring addresses: those of the settings where they give a broker, else the development stack's."""
    given = given_settings()
    if "nats_monitor_urls" in given or "nats_url" in given:
        return list(load_settings().nats_monitor_urls)
    url = read_dev_file(folder).nats_monitor_url
    return [url] if url else []


def _show(found: object, lines: Iterable[str], *, as_json: bool) -> None:
    """What was found or done: one object for machines, or lines for people."""
    if as_json:
        print_json(found)
        return
    for line in lines:
        out.print(line, markup=False)


def _profile(name: str | None) -> Profile:
    """What was asked for, else what the roles run with: the settings' where they give a broker or the profile itself."""
    if name is None:
        name = load_settings().profile if {"nats_url", "profile"} & given_settings() else "dev"
    return profile_named(name)


def _partitions(number: int | None) -> int | None:
    return load_settings().partitions if number is None else number


def _run(folder: Path, work: Callable[[Broker], Awaitable[Outcome]]) -> Outcome:
    import uvloop

    async def connected() -> Outcome:
        from engine.broker.jetstream import connect

        broker = await connect(nats_settings(folder, "seamark-topology"))
        try:
            return await work(broker)
        finally:
            await broker.close()

    return uvloop.run(connected())


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
        remedy = "Start it or set SEAMARK_REDIS_URL, then run the repair again"
        raise SeamarkError(f"Redis, which keeps the claims, does not do what is asked: {why}. {remedy}") from error
