"""`seamark verify`: hold a projection against the plain fold of its streams."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.output import err, out, print_json, stages
from ops.cli.rebuild import Projection
from ops.cli.target import DATA_FOLDER, Folder, Json
from ops.collecting import collect_rarely

if TYPE_CHECKING:
    from projections.verify.streams import StreamVerification, Verified

EXIT_DIFFERENT = 2


def verify(
    projection: Annotated[Projection, typer.Argument(help="What to recompute.")],
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Recompute a projection from its streams and print every difference; exit code 2 when there is one."""
    import uvloop
    from rich.markup import escape

    from ops.cli.stores import stores
    from projections.verify.tables import Verification
    from projections.verify.unread import UnreadVerification

    async def run() -> Verified:
        async with stores(folder, "seamark-verify") as found:
            broker, pool, partitions = found.broker, found.pool, found.partitions
            with stages(quiet=as_json) as progress:
                work: StreamVerification
                if projection is Projection.unread:
                    work = UnreadVerification(broker, found.redis, partitions, pool=pool, progress=progress)
                else:
                    work = Verification(broker, pool, projection.value, partitions, progress=progress)
                async for one in work.differences():
                    if as_json:
                        print_json({"difference": one})
                    else:
                        field = f" {one.field}:" if one.field else ":"
                        line = (
                            f"{one.what} {' / '.join(one.key)}{field} stored {one.stored!r}, expected {one.expected!r}"
                        )
                        out.print(escape(line))
                return work.result

    collect_rarely()
    result = uvloop.run(run())
    if as_json:
        print_json(result)
    else:
        older = f", {result.not_verifiable} rows are older than what the streams hold" if result.not_verifiable else ""
        err.print(f"{result.projection}: {result.compared} compared, {result.differences} differences{older}")
    if result.differences:
        sys.exit(EXIT_DIFFERENT)
