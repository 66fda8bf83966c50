"""`seamark config`: a tenant's types, templates and defaults as files."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from engine.errors import InvalidSetting
from ops.cli.output import err, out, print_json, stages
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, checked_tenant, nats_settings, postgres_url
from ops.exitcode import MISCONFIGURED

if TYPE_CHECKING:
    from engine.directory.configuration import Configuration, Difference
    from engine.postgres import Pool

EXIT_DIFFERENT = 2

APPLY_SECONDS = 120.0
"""All changes of a folder are one transaction: thousands of templates, each some milliseconds."""

BROKER_SECONDS = 3.0
"""What is stored is only made known sooner by the broker: nobody waits long for that."""

SIGNS = {"add": "+", "change": "~", "delete": "-", "keep": "?"}

Found = TypeVar("Found")

Files = Annotated[Path, typer.Argument(help="Folder of the files.")]
Prune = Annotated[bool, typer.Option("--prune", help="Delete what is not in the files.")]

app = typer.Typer(help="A tenant's types, templates and defaults as files: apply, diff, export.", no_args_is_help=True)


@app.command()
def apply(
    files: Files, prune: Prune = False, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False
) -> None:
    """Make the tenant's configuration what the files say, or change nothing where a file has a fault."""
    wanted, name = _read(files, as_json=as_json), checked_tenant(tenant)

    async def work(pool: Pool) -> list[Difference]:
        from engine.directory.changes import changing
        from engine.directory.configuration import apply_configuration

        with stages(quiet=as_json) as progress:
            async with changing(pool, name, APPLY_SECONDS) as change:
                found = await apply_configuration(
                    change, wanted, prune=prune, progress=lambda done, total: progress("apply", done, total)
                )
        if change.made:
            await _ring(folder)
        return found

    found = _run(folder, work)
    _show(found, as_json=as_json)
    done = sum(one.action != "keep" for one in found)
    if not as_json:
        out.print(f"{done} changes applied" if done else "nothing to do")


@app.command()
def diff(
    files: Files, prune: Prune = False, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False
) -> None:
    """Show what `apply` would change, and change nothing; exit code 2 when there is something."""
    wanted, name = _read(files, as_json=as_json), checked_tenant(tenant)

    async def work(pool: Pool) -> list[Difference]:
        from engine.directory.configuration import differences

        return differences(await _stored(pool, name), wanted, prune=prune)

    found = _run(folder, work)
    _show(found, as_json=as_json)
    if any(one.action != "keep" for one in found):
        sys.exit(EXIT_DIFFERENT)
    if not as_json:
        out.print("nothing to do")


@app.command()
def export(files: Files, tenant: Tenant = None, folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Write the tenant's configuration into a folder that has none. Applied, it changes nothing, or its faults are named."""
    from engine.directory.templates import SHAPES
    from ops.config_files import write_folder

    name = checked_tenant(tenant)
    stored = _run(folder, lambda pool: _stored(pool, name))
    written = write_folder(files, stored)
    for key in stored.templates:
        if key.channel not in SHAPES:
            err.print(f"seamark: left out: template {key}, which nothing uses: delete it", markup=False)
    if as_json:
        print_json({"written": [str(path) for path in written]})
    else:
        out.print(f"{len(written)} files written to {files}", markup=False)


@app.command()
def preview(
    type: Annotated[str, typer.Argument(help="Type of the notification, as order.shipped.")],
    channel: Annotated[str, typer.Argument(help="email, push or sms.")],
    data: Annotated[str, typer.Option("--data", help="JSON: the data of the notification.")] = "{}",
    locale: Annotated[str, typer.Option("--locale", help="Language, as de or pt-BR.")] = "default",
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show what the active template says with some data: subject, text and HTML, or the segments of an SMS. Sends nothing."""
    import msgspec

    from engine.worker.preview import NothingSent, Preview, ToPreview, previewed

    name = checked_tenant(tenant)
    try:
        given = {"type": type, "channel": channel, "locale": locale, "data": msgspec.json.decode(data)}
        asked = msgspec.convert(given, ToPreview)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidSetting(f"preview: {error}") from error

    async def work(pool: Pool) -> Preview:
        try:
            return await previewed(pool, name, 0, asked)
        except NothingSent as error:
            raise InvalidSetting(f"preview: {error}") from error

    found = _run(folder, work)
    if as_json:
        print_json(found)
        return
    for member, value in msgspec.structs.asdict(found).items():
        if value is not None and member not in ("channel", "from_template"):
            shown = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
            out.print(f"[bold]{member}[/]")
            out.print(shown, markup=False, highlight=False)
    if not found.from_template:
        err.print("there is no template for this: the plain default is shown")


def _read(files: Path, *, as_json: bool) -> Configuration:
    """The files; where one has a fault, all faults are shown and the command ends."""
    from ops.config_files import read_folder

    wanted, faults = read_folder(files)
    for fault in faults:
        if as_json:
            print_json({"fault": fault})
        else:
            err.print(f"seamark: {fault}", style="red", markup=False)
    if faults:
        sys.exit(MISCONFIGURED)
    return wanted


async def _stored(pool: Pool, tenant: str) -> Configuration:
    from engine.directory.configuration import read_configuration
    from engine.postgres import one_view

    async with one_view(pool) as connection:
        return await read_configuration(connection, tenant)


async def _ring(folder: Path) -> None:
    """Tell processes. What is stored stays so where that fails: they find it by themselves within half a minute."""
    from engine.broker.jetstream import connect
    from engine.directory.bell import ring
    from engine.errors import BrokerError

    try:
        async with asyncio.timeout(BROKER_SECONDS):
            broker = await connect(nats_settings(folder, "seamark-config"))
    except (BrokerError, TimeoutError):
        err.print("stored, but the broker does not answer: processes find the change within half a minute")
        return
    try:
        await ring(broker)
    finally:
        await broker.close()


def _show(found: list[Difference], *, as_json: bool) -> None:
    for one in found:
        if as_json:
            print_json(one)
            continue
        why = f": {', '.join(one.fields)}" if one.fields else ""
        kept = " is not in the files; --prune deletes it" if one.action == "keep" else ""
        out.print(f"{SIGNS[one.action]} {one.kind} {one.name}{why}{kept}", markup=False)


def _run(folder: Path, work: Callable[[Pool], Awaitable[Found]]) -> Found:
    """Do `work` on the database that the settings or the folder name."""
    import uvloop

    from ops.postgres import opened

    url = postgres_url(folder)

    async def run() -> Found:
        async with opened(url) as pool:
            return await work(pool)

    return uvloop.run(run())
