"""`seamark tail`: follow a user's log as a device does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from engine.errors import InvalidSetting
from seamark.cli.output import err, out, print_json
from seamark.cli.target import DATA_FOLDER, Folder, Json, Tenant, read_dev_file
from seamark.cli.token import sign


def tail(
    user: Annotated[str, typer.Argument(help="Whose log.")],
    cursor: Annotated[
        str, typer.Option("--cursor", help='Where to go on; "start" is the oldest kept record.')
    ] = "start",
    count: Annotated[int, typer.Option("--count", "-n", help="End after so many records; 0: never.")] = 0,
    url: Annotated[
        str | None, typer.Option("--url", help="Gateway; needs --token-file.", envvar="SEAMARK_GATEWAY_URL")
    ] = None,
    token: Annotated[str | None, typer.Option("--token-file", help="File with the user's token.")] = None,
    device: Annotated[str, typer.Option("--device", help="Name of this device.")] = "seamark-tail",
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Print a user's records as they come, each with its seq, prev and cursor. Ctrl-C ends."""
    import uvloop

    address, secret = _gateway(url, token, folder, user, tenant)

    async def run() -> None:
        from seamark import Reset, connect
        from seamark.client import Record, State

        def say(state: State) -> None:
            if state is State.WAITING:
                why = connection.last_end.reason if connection.last_end else ""
                err.print(f"[yellow]not connected[/] to {address}, trying again" + (f": {escape(why)}" if why else ""))

        left = count
        connection = connect(address, token=secret, device=device, cursor=cursor, on_state=say)
        async with connection:
            async for item in connection.events():
                if isinstance(item, Record):
                    _show(item, as_json=as_json)
                    left -= 1
                    if count and left <= 0:
                        item.ack()
                        return
                elif isinstance(item, Reset):
                    err.print(f"[yellow]reset[/] ({item.reason}): the log goes on from {item.cursor}")

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(run())


def _gateway(url: str | None, token_file: str | None, folder: Path, user: str, tenant: str | None) -> tuple[str, Any]:
    """The gateway's address and where the token comes from."""
    if url is None:
        stack = read_dev_file(folder)
        return stack.gateway_url, lambda: sign(stack.jwt_secret, tenant or stack.tenant, user, 3600)
    if token_file is None:
        raise InvalidSetting("--url needs --token-file: a file with the user's token")
    return url, Path(token_file).read_text(encoding="utf-8").strip()


def _show(item: Any, *, as_json: bool) -> None:
    if as_json:
        print_json({"seq": item.seq, "prev": item.prev, "cursor": item.cursor, "record": item.record})
        return

    # What a service wrote may hold brackets that rich would take for its own markup.
    record = {name: escape(str(value)) for name, value in item.record.items()}
    kind = record["type"] if item.type else record.get("kind", "?")
    out.print(f"[dim]{record.get('at', '')}[/]  [bold]{kind}[/]  {record.get('data', '')}")
    out.print(f"[dim]  id {record.get('id')}  seq {item.seq}  prev {item.prev}  cursor {item.cursor}[/]")
