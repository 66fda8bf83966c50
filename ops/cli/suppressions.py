"""`seamark suppressions`: addresses that get nothing any more, many at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import InvalidSetting
from ops.cli.moments import time_of
from ops.cli.output import out, print_json
from ops.cli.stores import urls
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, checked_tenant

if TYPE_CHECKING:
    from engine.directory.suppressions import Chosen

LIFT_SECONDS = 30.0
"""One step of a thousand."""

app = typer.Typer(help="Suppressions: addresses that get nothing any more.", no_args_is_help=True)


@app.command()
def lift(
    reason: Annotated[str, typer.Option("--reason", help="As hard_bounce, soft_bounces, complaint or invalid_number.")],
    channel: Annotated[str | None, typer.Option("--channel", help="email or sms.")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Who said so, or the beginning of it: a provider's name.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Made since then: 90m, 2h, 3d, or a time as 2026-01-31T12:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Made before; as --since.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Lift all suppressions that have this in common, as when a provider has called good addresses bad.

    Legal opt-outs are never lifted in this way. No address is printed.
    """
    import uvloop

    chosen, name = _chosen(reason, channel, source, since, until), checked_tenant(tenant)
    count = uvloop.run(_counted(folder, name, chosen) if dry_run else _lifted(folder, name, chosen))
    if as_json:
        print_json({"found" if dry_run else "lifted": count})
    else:
        out.print(f"{count} {'would be lifted' if dry_run else 'lifted'}", markup=False)


def _chosen(reason: str, channel: str | None, source: str | None, since: str | None, until: str | None) -> Chosen:
    import msgspec

    from engine.directory.suppressions import Chosen

    times = {"since": since, "until": until}
    said = {"reason": reason, "channel": channel, "source": source}
    moments = {one: time_of(f"--{one}", text) for one, text in times.items() if text is not None}
    try:
        return msgspec.convert({name: value for name, value in said.items() if value is not None} | moments, Chosen)
    except msgspec.ValidationError as error:
        raise InvalidSetting(str(error)) from error


async def _counted(folder: Path, tenant: str, chosen: Chosen) -> int:
    from engine.directory.suppressions import count_chosen
    from engine.postgres import asking
    from ops.postgres import opened

    async with opened(urls(folder)[0]) as pool, asking(pool, LIFT_SECONDS) as connection:
        return await count_chosen(connection, tenant, chosen)


async def _lifted(folder: Path, tenant: str, chosen: Chosen) -> int:
    from redis.asyncio import Redis

    from engine.directory.changing import Directory
    from engine.directory.suppressing import lift_some
    from engine.profiles.cache import ProfileCache
    from engine.profiles.reader import read_profile
    from ops.postgres import opened

    url, redis_url = urls(folder)
    redis = Redis.from_url(redis_url, socket_connect_timeout=2, socket_timeout=None)
    async with opened(url) as pool, redis:
        profiles = ProfileCache(redis, partial(read_profile, pool))
        try:
            total, more = 0, True
            while more:
                lifted, more = await lift_some(Directory(pool, profiles), tenant, chosen, LIFT_SECONDS)
                total += lifted
            return total
        finally:
            await profiles.close()
