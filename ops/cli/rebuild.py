"""`seamark rebuild`: fold a projection anew beside the live one, then switch to it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import InvalidSetting
from ops.cli.output import out, print_json, stages
from ops.cli.target import DATA_FOLDER, Folder, Json

if TYPE_CHECKING:
    from ops.cli.stores import Stores
    from projections.rebuild.carrying import Carried
    from projections.rebuild.tables import Progress, Rebuilt


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

    Rows that the log no longer holds are carried over, and said to be.
    """
    import uvloop

    from ops.cli.stores import stores

    if projection is Projection.unread and tenant is not None:
        raise InvalidSetting("unread is rebuilt for all tenants at once: leave --tenant out")

    async def run() -> Rebuilt:
        with stages(quiet=as_json) as told:

            def progress(p: int, reached: int, target: int) -> None:
                told(f"partition {p}", reached, target)

            def carried(done: int, total: int) -> None:
                told("carried over", done, total)

            async with stores(folder, "seamark-rebuild") as open_stores:
                return await _rebuild(open_stores, projection, tenant, progress, carried)

    done = uvloop.run(run())
    if as_json:
        print_json(done)
    else:
        carried = f", {done.carried} rows carried over that the log no longer holds" if done.carried else ""
        out.print(f"{done.projection}: {done.records} records folded{carried}; readers are on version {done.version}")


async def _rebuild(
    stores: Stores, projection: Projection, tenant: str | None, progress: Progress, carried: Carried
) -> Rebuilt:
    from projections.rebuild.tables import Rebuild
    from projections.rebuild.unread import rebuild_unread

    if projection is Projection.unread:
        return await rebuild_unread(stores.broker, stores.redis, stores.partitions, progress=progress)
    work = Rebuild(
        stores.broker,
        stores.pool,
        projection.value,
        stores.partitions,
        tenant=tenant,
        progress=progress,
        carried=carried,
    )
    return await work.run()
