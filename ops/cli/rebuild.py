"""`seamark rebuild`: fold a projection anew beside the live one, then switch to it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import InvalidSetting
from ops.cli.output import out, print_json, stages
from ops.cli.target import DATA_FOLDER, Folder, Json
from ops.collecting import collect_rarely

if TYPE_CHECKING:
    from projections.rebuild.folding import Rebuilt


class Projection(StrEnum):
    """What can be folded anew."""

    unread = "unread"
    inbox = "inbox"
    deliveries = "deliveries"


def rebuild(
    projection: Annotated[Projection, typer.Argument(help="What to fold anew.")],
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's rows (not for unread).")] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Build a projection from its streams beside the live one and switch: readers see the one or the other, whole.

    Rows that the log no longer holds are carried over and counted.
    """
    import uvloop

    from ops.cli.stores import stores
    from projections.rebuild.tables import Rebuild
    from projections.rebuild.unread import rebuild_unread

    if projection is Projection.unread and tenant is not None:
        raise InvalidSetting("unread is rebuilt for all tenants at once: leave --tenant out")

    async def run() -> Rebuilt:
        async with stores(folder, "seamark-rebuild") as found:
            with stages(quiet=as_json) as progress:
                if projection is Projection.unread:
                    return await rebuild_unread(found.broker, found.redis, found.partitions, progress=progress)
                name, partitions = projection.value, found.partitions
                return await Rebuild(found.broker, found.pool, name, partitions, tenant=tenant, progress=progress).run()

    collect_rarely()
    done = uvloop.run(run())
    if as_json:
        print_json(done)
    else:
        carried = f", {done.carried} rows carried over that the log no longer holds" if done.carried else ""
        out.print(f"{done.projection}: {done.records} records folded{carried}; readers are on version {done.version}")
