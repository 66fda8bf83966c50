"""`seamark api-key`: what services, and operators, show over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from engine.errors import InvalidSetting
from ops.cli.output import err, out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, postgres_url
from seamark.protocol.errors import InvalidToken

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.access.key_table import KeyTable, StoredKey

EXIT_UNKNOWN = 2
DAYS_MAX = 36_500
ID_MAX = (1 << 63) - 1

Found = TypeVar("Found")

app = typer.Typer(help="API keys of services: create, list, revoke.", no_args_is_help=True)


@app.command()
def create(
    tenant: Annotated[str | None, typer.Option("--tenant", help="The tenant whose service gets the key.")] = None,
    scope: Annotated[list[str] | None, typer.Option("--scope", help="What it allows; all by default.")] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="A key for an operator, who may ask for every tenant.")
    ] = False,
    name: Annotated[str, typer.Option("--name", help="For people: which service has it.")] = "",
    days: Annotated[
        int | None, typer.Option("--days", help="How long it is valid; for ever by default.", min=1, max=DAYS_MAX)
    ] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Make a key and print it: this once, as only its hash is kept."""
    scopes = _checked(tenant, scope, name, operator=operator)
    expires_at = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    made = _run(folder, lambda table: table.create(tenant, scopes, name=name, expires_at=expires_at))
    if as_json:
        print_json(
            {"id": made.stored.id, "key": made.key, "tenant": tenant, "scopes": scopes, "expires_at": expires_at}
        )
        return
    whom = "an operator" if operator else f"tenant {tenant}, scopes {' '.join(scopes)}"
    err.print(f"key {made.stored.id} for {whom}; it is not shown again:", markup=False)
    typer.echo(made.key)


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """List all keys ever made, without the keys themselves."""
    for key in _run(folder, lambda table: table.all(tenant)):
        if as_json:
            print_json(key)
        else:
            out.print(_line(key), markup=False)


@app.command()
def revoke(
    id: Annotated[int, typer.Argument(help="Number of the key, as `list` shows it.", min=1, max=ID_MAX)],
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """End a key; exit code 2 when there is none of this number. Gateways notice within a minute."""
    key = _run(folder, lambda table: table.revoke(id))
    if key is None:
        err.print(f"there is no key {id}: `seamark api-key list` shows all")
        sys.exit(EXIT_UNKNOWN)
    if as_json:
        print_json(key)
    else:
        out.print(_line(key), markup=False)


def _checked(tenant: str | None, scopes: list[str] | None, name: str, *, operator: bool) -> list[str]:
    from gateway.access.principals import Scope
    from seamark.protocol.subjects import encode_token

    if operator == (tenant is not None) or (operator and scopes):
        raise InvalidSetting("give either --tenant, with any --scope, or --operator")
    try:
        if tenant is not None:
            encode_token(tenant)
    except InvalidToken as error:
        raise InvalidSetting(f"--tenant: {error}") from error
    if not name.isprintable():
        raise InvalidSetting("--name must be one line of text")
    if unknown := sorted(set(scopes or ()) - set(Scope)):
        raise InvalidSetting(f"--scope: there is no {', '.join(unknown)}; choose of {', '.join(Scope)}")
    return [] if operator else sorted(set(scopes or Scope))


def _line(key: StoredKey) -> str:
    if key.revoked_at is not None:
        state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}"
    elif key.expires_at is not None:
        state = f"{'expired' if key.expires_at <= datetime.now(UTC) else 'until'} {key.expires_at:%Y-%m-%d %H:%M}"
    else:
        state = "valid"
    allows = f"{key.tenant}  {' '.join(key.scopes)}" if key.tenant is not None else "operator"
    return f"{key.id:>5}  {allows}  made {key.created_at:%Y-%m-%d}  {state}  {key.name}".rstrip()


def _run(folder: Path, work: Callable[[KeyTable], Awaitable[Found]]) -> Found:
    """Do `work` on the table of the database that settings or folder name."""
    import uvloop

    from gateway.access.key_table import KeyTable
    from ops.postgres import FAILURES, connect, explained

    url = postgres_url(folder)

    async def run() -> Found:
        connection = await connect(url)
        try:
            return await work(KeyTable(connection))
        except FAILURES as error:
            raise explained(error) from error
        finally:
            connection.terminate()

    return uvloop.run(run())
