"""`seamark control`: what operators hold, drop, pause and throttle, within a second and in every process."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from engine.errors import InvalidSetting
from ops.cli.output import err, out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, nats_settings, postgres_url

if TYPE_CHECKING:
    from engine.controls.document import Control, InForce, Rehydrate
    from engine.controls.store import ControlStore, Read

Found = TypeVar("Found")

app = typer.Typer(
    help="Hold, drop, pause and throttle what is sent and published; within a second, in every process.",
    no_args_is_help=True,
)

Why = Annotated[str, typer.Option("--why", help="The reason, for whoever reads the log; one line.")]
Who = Annotated[str | None, typer.Option("--who", help="Who does it; by default you, on this machine.")]
Version = Annotated[
    int | None, typer.Option("--version", help="Only if the controls still have this version, as `show` says it.")
]
OneTenant = Annotated[str | None, typer.Option("--tenant", help="Of this tenant.")]
Channel = Annotated[str | None, typer.Option("--channel", help="push, email, sms or webhook.")]
Provider = Annotated[str | None, typer.Option("--provider", help="Of this provider.")]
Category = Annotated[str | None, typer.Option("--category", help="Of this category.")]
Lane = Annotated[str | None, typer.Option("--lane", help="critical, normal or bulk.")]
Type = Annotated[str | None, typer.Option("--type", help="Of this type, or of those below it (`order.*`).")]


@app.command()
def show(folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Show what is in force: since when, by whom and why."""
    read = _run(folder, lambda desk: desk.read())
    if as_json:
        print_json({"version": read.version, "controls": read.document.controls})
        return
    out.print(f"version {read.version}: {len(read.document.controls) or 'no'} controls in force", markup=False)
    for each in read.document.controls:
        out.print(f"  {_line(each)}", markup=False)


@app.command()
def kill(
    why: Why,
    tenant: OneTenant = None,
    channel: Channel = None,
    provider: Provider = None,
    category: Category = None,
    mode: Annotated[str, typer.Option("--mode", help="hold: jobs go when it is restored; drop: they end.")] = "hold",
    who: Who = None,
    version: Version = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Send nothing of a tenant, by a channel or provider, of a category, or of what several of these name together."""
    target = _target("kill", tenant=tenant, channel=channel, provider=provider, category=category, mode=mode)
    _change(folder, target, why, who, version, as_json=as_json)


@app.command()
def pause(
    why: Why,
    lane: Lane = None,
    channel: Channel = None,
    who: Who = None,
    version: Version = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Let a lane wait, of one channel or of all. `--lane bulk` of all channels also holds up campaigns' events."""
    _change(folder, _target("pause", lane=lane, channel=channel), why, who, version, as_json=as_json)


@app.command()
def throttle(
    why: Why,
    tenant: OneTenant = None,
    per_minute: Annotated[
        int | None, typer.Option("--per-minute", help="Events over HTTP, over all gateways; 0: none.")
    ] = None,
    type: Type = None,
    who: Who = None,
    version: Version = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Let the services of a tenant publish fewer events over HTTP; those beyond get 429 with Retry-After."""
    target = _target("throttle", tenant=tenant, per_minute=per_minute, type=type)
    _change(folder, target, why, who, version, as_json=as_json)


@app.command()
def restore(
    why: Why,
    kind: Annotated[str, typer.Argument(help="kill, pause or throttle.")],
    tenant: OneTenant = None,
    channel: Channel = None,
    provider: Provider = None,
    category: Category = None,
    lane: Lane = None,
    type: Type = None,
    percent: Annotated[
        int | None,
        typer.Option("--percent", help="How many of the users a kill switch lets through; 100, or not said: it goes."),
    ] = None,
    who: Who = None,
    version: Version = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Take a control off again, named as it was set; a kill switch also step by step, as in 10, 50, 100 percent."""
    given = {
        "tenant": tenant,
        "channel": channel,
        "provider": provider,
        "category": category,
        "lane": lane,
        "type": type,
    }
    if kind != "kill" and percent is not None:
        raise InvalidSetting("--percent: only kill switches are restored step by step; set another throttle instead")
    if kind == "throttle":
        given["per_minute"] = 0  # type: ignore[assignment]
    elif kind not in ("kill", "pause"):
        raise InvalidSetting(f"there is no {kind!r} to restore: choose kill, pause or throttle")
    target = _target(kind, **given)
    _change(folder, target, why, who, version, restore=True, percent=percent, as_json=as_json)


@app.command()
def rehydrate(
    why: Why,
    tenant: OneTenant = None,
    user: Annotated[str | None, typer.Option("--user", help="Only this user's devices.")] = None,
    who: Who = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Have the connected devices of a tenant, or of one user, read their log again; 100 a second in each gateway process."""
    _change(folder, _target("rehydrate", tenant=tenant, user=user), why, who, None, as_json=as_json)


@app.command("log")
def log_(
    limit: Annotated[int, typer.Option("--limit", help="So many, the newest first.", min=1, max=10_000)] = 20,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show who has changed what, and why, as far back as 400 days."""
    import uvloop

    from engine.controls.log import last
    from ops.postgres import FAILURES, connect, explained

    url = postgres_url(folder)

    async def run() -> list[Any]:
        connection = await connect(url)
        try:
            return await last(connection, limit)
        except FAILURES as error:
            raise explained(error) from error
        finally:
            connection.terminate()

    for row in uvloop.run(run()):
        if as_json:
            print_json(row)
        else:
            what = bytes(row.after or row.before or b"").decode()
            out.print(f"{row.at:%Y-%m-%d %H:%M:%S}  {row.action}  {what}  {row.who}: {row.why}", markup=False)


def _target(kind: str, **given: Any) -> Control | Rehydrate:
    """A control of what was given.

    Raises:
        InvalidSetting: it names what there is not; the message says which option.
    """
    import msgspec

    from engine.controls.document import Kill, Pause, Rehydrate, Throttle

    said = {name: value for name, value in given.items() if value is not None}
    form: Any = {"kill": Kill, "pause": Pause, "throttle": Throttle, "rehydrate": Rehydrate}[kind]
    known = {field.name: field.required for field in msgspec.structs.fields(form)}
    for name in said:
        if name not in known:
            raise InvalidSetting(f"{_option(name)} says nothing of a {kind}: leave it out")
    for name, required in known.items():
        if required and name not in said:
            raise InvalidSetting(f"{_option(name)} is missing: it says what to {kind}")
    try:
        target: Control | Rehydrate = msgspec.convert({"kind": kind, **said}, form)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        raise InvalidSetting(f"{_option(path.rstrip('`'))}: {text}") from error
    return target


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _change(
    folder: Path,
    target: Control | Rehydrate,
    why: str,
    who: str | None,
    version: int | None,
    *,
    restore: bool = False,
    percent: int | None = None,
    as_json: bool,
) -> None:
    """Make a change, show it, and write it into the log where PostgreSQL answers."""
    from engine.controls.changing import Asked, InvalidControl

    asked = Asked(target, who or _me(), why, restore, percent)
    try:
        read = _run(folder, lambda desk: desk.change(asked, version=version))
    except InvalidControl as error:
        where = f"{_option(error.field)}: " if error.field else ""
        raise InvalidSetting(f"{where}{error}") from error
    _log_now(folder, read)
    made = read.document.changes[-1]
    if as_json:
        print_json({"version": read.version, "change": made})
    else:
        out.print(f"{made.action}: {target.name or 'everything'}; version {read.version}", markup=False)


def _me() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = "somebody"
    return f"{name}@{socket.gethostname()}"[:200]


def _log_now(folder: Path, read: Read) -> None:
    """A row at once, if it can be had; else a gateway writes it, as the bucket remembers the change."""
    import uvloop

    from engine.controls.log import write_to
    from ops.postgres import FAILURES

    try:
        uvloop.run(write_to(postgres_url(folder), read.document.changes))
    except (InvalidSetting, *FAILURES) as error:
        err.print(f"not yet in control_log, a gateway will write it: {type(error).__name__}", markup=False)


def _line(each: InForce) -> str:
    kind = type(each.control).__name__.lower()
    more = [kind, each.control.name]
    more += [str(getattr(each.control, "mode", ""))]
    if percent := getattr(each.control, "percent", 0):
        more += [f"{percent} % let through"]
    if (rate := getattr(each.control, "per_minute", None)) is not None:
        more += [f"{rate} a minute"]
    at = datetime.fromtimestamp(each.at, UTC)
    return f"{'  '.join(filter(None, more))}  since {at:%Y-%m-%d %H:%M:%S}  {each.who}: {each.why}"


def _run(folder: Path, work: Callable[[ControlStore], Awaitable[Found]]) -> Found:
    """Do `work` at the control bucket of the broker that the settings or the folder name."""
    import uvloop

    from engine.broker.jetstream import connect
    from engine.controls.store import ControlStore

    async def run() -> Found:
        broker = await connect(nats_settings(folder, "seamark-control"))
        try:
            return await work(ControlStore(broker))
        finally:
            await broker.close()

    return uvloop.run(run())
