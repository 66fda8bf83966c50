"""`seamark retention`: how long rows of the tables are kept, for all tenants or for one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from engine.errors import InvalidSetting
from ops.cli.output import out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, postgres_url
from seamark.protocol.errors import InvalidToken

if TYPE_CHECKING:
    from pathlib import Path

    from projections.retention.rules import Kept, RetentionTable

DAYS_MAX = 400

Found = TypeVar("Found")

app = typer.Typer(help="How long inbox and delivery rows are kept: show it, set it.", no_args_is_help=True)


@app.command("list")
def list_(folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Show for how many days rows are kept: for all tenants, and for each that has a time of its own."""
    for tenant, kept in sorted(_run(folder, lambda table: table.all()).items()):
        _show(tenant, kept, as_json=as_json)


@app.command("set")
def set_(
    days: Annotated[
        int, typer.Argument(help="Rows are kept for so long, and until the end of that month.", min=1, max=DAYS_MAX)
    ],
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="For this tenant; default: for all that have no time of their own.")
    ] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Set for how long rows are kept that are folded from now on. `seamark rebuild` applies it to all rows."""
    from seamark.protocol.subjects import encode_token

    try:
        if tenant is not None:
            encode_token(tenant)
    except InvalidToken as error:
        raise InvalidSetting(f"--tenant: {error}") from error
    if "\0" in (tenant or ""):
        raise InvalidSetting("--tenant: a name with a NUL cannot be stored")
    kept = _run(folder, lambda table: table.set(tenant or "", days))
    _show(tenant or "", kept, as_json=as_json)


def _show(tenant: str, kept: Kept, *, as_json: bool) -> None:
    if as_json:
        print_json({"tenant": tenant or None, "days": kept.days, "not_before": kept.not_before})
        return
    name = f"tenant {tenant}" if tenant else "every tenant without a time of its own"
    later = f"; no row leaves before {kept.not_before:%Y-%m-%d}" if kept.not_before is not None else ""
    out.print(f"{name}: {kept.days} days{later}", markup=False)


def _run(folder: Path, work: Callable[[RetentionTable], Awaitable[Found]]) -> Found:
    """Do `work` on the table `retention` of the database that the settings or the folder name."""
    import uvloop

    from ops.postgres import opened
    from projections.retention.rules import RetentionTable

    url = postgres_url(folder)

    async def run() -> Found:
        async with opened(url) as pool:
            return await work(RetentionTable(pool))

    return uvloop.run(run())
