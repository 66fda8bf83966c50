"""`seamark dev`: everything on this machine, ready for a first notification."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import signal
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from engine.settings import PORT_MAX
from engine.tasks import run_until
from engine.topology.files import PARTITIONS_MAX
from ops.cli.output import err, out, print_json
from ops.cli.target import DATA_FOLDER, DevFile, Folder, Json, shown
from seamark.protocol.errors import SeamarkError

if TYPE_CHECKING:
    from ops.dev.stack import Options, Stack


def dev(
    folder: Folder = DATA_FOLDER,
    port: Annotated[
        int | None, typer.Option("--port", help="Port of the gateway; 8080 if it is free.", min=1, max=PORT_MAX)
    ] = None,
    partitions: Annotated[
        int | None, typer.Option("--partitions", help="Fixed with the first run; 4.", min=1, max=PARTITIONS_MAX)
    ] = None,
    processes: Annotated[int, typer.Option("--processes", help="Gateway processes; 0: one per core.", min=0)] = 1,
    traces: Annotated[
        bool, typer.Option("--traces", help="Follow every notification, and show its way on a page of its own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start the embedded stack and keep it running until Ctrl-C."""
    import uvloop

    from ops.dev.child import ServerFailed
    from ops.dev.stack import Options

    try:
        uvloop.run(_serve(Options(folder, port, partitions, processes, traces), as_json=as_json))
    except ServerFailed as error:
        raise SeamarkError(str(error)) from error


async def _serve(options: Options, *, as_json: bool) -> None:
    from ops.dev.stack import started

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    await run_until(stop, _keep_running(started(options, _say), options.data, as_json=as_json), name="stack")


async def _keep_running(stack_context: AbstractAsyncContextManager[Stack], data: Path, *, as_json: bool) -> None:
    """Until cancelled; however it ends, everything is stopped in order."""
    async with stack_context as stack:
        if as_json:
            print_json(stack.describe())
        else:
            _print(stack.describe(), stack.monitor_url, data)
        await stack.keep()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the stack serves on where nobody can be told
        err.print(f"[dim]·[/] {escape(line)}")  # a log's tail may hold brackets


def _print(stack: DevFile, monitor_url: str | None, data: Path) -> None:
    where = "" if data == DATA_FOLDER else f" --folder {shlex.quote(str(data))}"
    seamark = _command()
    out.print()
    out.print(f"[bold green]Seamark is running.[/] Data, logs and keys: {data}/ ({data}/dev.json)")
    out.print()
    outbox = (
        []
        if stack.outbox_url is None
        else [("outbox", f"{stack.outbox_url}/  (what was sent by push, mail, SMS and webhooks)")]
    )
    traces = [] if stack.trace_url is None else [("traces", f"{stack.trace_url.partition('/traces/')[0]}/")]
    for name, value in (
        ("page", f"[link={stack.gateway_url}]{stack.gateway_url}/[/link]"),
        *outbox,
        *traces,
        ("gateway", f"{stack.gateway_url}  (WebSocket /v1/ws, events POST /v1/events)"),
        ("NATS", shown(stack.nats_url) + (f"  (monitoring {monitor_url})" if monitor_url else "")),
        ("Valkey", shown(stack.redis_url)),
        ("PostgreSQL", shown(stack.postgres_url)),
    ):
        out.print(f"  {name:<12}{value}")
    out.print()
    out.print("Send a first notification, and watch it arrive on both pages:")
    body = """'{"text":"hi"}'"""
    channels = "--channel inapp --channel push --channel email --channel sms"
    out.print(f"  [bold cyan]{seamark} publish{where} --to {stack.user} --type demo.hello {channels} --data {body}[/]")
    out.print(f"  {seamark} tail{where} {stack.user}")
    out.print()
    out.print("Look inside with the nats CLI (the stack's own broker asks for no credentials):")
    out.print(f"  nats --server {shown(stack.nats_url)} stream report")
    out.print(f"  nats --server {shown(stack.nats_url)} sub 'live.>'")
    out.print()
    out.print(f"A token for {stack.user}, should you need one:")
    out.print(f"  {stack.token}", style="dim")
    out.print()
    out.print("Ctrl-C stops everything; the data stays.")


def _command() -> str:
    """How the user can call this very installation."""
    beside = Path(sys.executable).with_name("seamark")
    on_path = shutil.which("seamark")
    if on_path is not None and Path(on_path).samefile(beside):
        return "seamark"
    here = Path.cwd()
    return str(beside.relative_to(here)) if beside.is_relative_to(here) else str(beside)
