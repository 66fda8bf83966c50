"""`seamark tail`: follow a user's log as a device does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from engine.errors import InvalidSetting
from ops.cli.output import err, out, print_json, readable
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, read_dev_file
from ops.cli.token import sign


def tail(
    user: Annotated[str, typer.Argument(help="Whose log.")],
    cursor: Annotated[
        str, typer.Option("--cursor", help='Where to go on; "start" is the oldest kept record.')
    ] = "start",
    count: Annotated[int, typer.Option("--count", "-n", help="End after so many records; 0: never.", min=0)] = 0,
    url: Annotated[
        str | None, typer.Option("--url", help="Gateway; needs --token-file.", envvar="SEAMARK_GATEWAY_URL")
    ] = None,
    token: Annotated[str | None, typer.Option("--token-file", help="File with the user's token.")] = None,
    device: Annotated[str, typer.Option("--device", help="Name of this device.")] = "seamark-tail",
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Print a user's records as they come, each with its seq, prev and cursor, and what is never stored. Ctrl-C ends."""
    import uvloop

    address, secret = _gateway(url, token, folder, user, tenant)

    async def run() -> None:
        from seamark import Now, Record, Reset, State, connect

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
                elif isinstance(item, Now):
                    _show_now(item, as_json=as_json)
                elif isinstance(item, Reset):
                    err.print(f"[yellow]reset[/] ({item.reason}): the log goes on from {item.cursor}")

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(run())


def _gateway(url: str | None, token_file: str | None, folder: Path, user: str, tenant: str | None) -> tuple[str, Any]:
    """The gateway's address and where the token comes from.

    Raises:
        InvalidSetting: options that contradict each other, or a token that cannot be read.
    """
    if url is None:
        if token_file is not None:
            raise InvalidSetting("--token-file needs --url: the development stack takes tokens of its own")
        stack = read_dev_file(folder)
        return stack.gateway_url, lambda: sign(stack.jwt_secret, tenant or stack.tenant, user, 3600)
    if token_file is None:
        raise InvalidSetting("--url needs --token-file: a file with the user's token")
    token = _read_token(token_file)
    _check_whose(token, user, tenant)
    return url, token


def _read_token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidSetting(f"--token-file: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidSetting(f"--token-file: {path} is not text: write the user's token into it") from error
    if not token:
        raise InvalidSetting(f"--token-file: {path} is empty: write the user's token into it")
    return token


def _check_whose(token: str, user: str, tenant: str | None) -> None:
    """The token decides whose log comes: one of somebody else must not pass for the user's that was asked for."""
    import jwt

    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except jwt.InvalidTokenError:
        return  # the gateway says what is wrong with it
    if claims.get("sub") != user:
        raise InvalidSetting(
            f"--token-file holds a token of {claims.get('sub')!r}, not of {user!r}: name the user it is for"
        )
    if tenant is not None and claims.get("tenant") != tenant:
        raise InvalidSetting(
            f"--token-file holds a token of tenant {claims.get('tenant')!r}, not of {tenant!r}: leave --tenant out"
        )


def _show_now(item: Any, *, as_json: bool) -> None:
    if as_json:
        print_json({"now": {"id": item.id, "type": item.type, "data": item.data}})
    else:
        out.print(f"[dim]not stored[/]  [bold]{escape(item.type)}[/]  {escape(str(item.data))}")


def _show(item: Any, *, as_json: bool) -> None:
    content, record = readable(item.raw)
    if as_json:
        print_json({"seq": item.seq, "prev": item.prev, "cursor": item.cursor, **content})
        return
    if record is None:
        out.print(f"[dim]seq {item.seq}[/]  no record: {escape(repr(item.raw[:200]))}")
        return
    # What a service wrote may hold brackets that rich would take for its own markup.
    text = {name: escape(str(value)) for name, value in record.items()}
    kind = text["type"] if record.get("type") else text.get("kind", "?")
    out.print(f"[dim]{text.get('at', '')}[/]  [bold]{kind}[/]  {text.get('data', '')}")
    out.print(f"[dim]  id {text.get('id')}  seq {item.seq}  prev {item.prev}  cursor {item.cursor}[/]")
