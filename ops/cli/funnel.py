"""`seamark funnel`: how far the notifications of a window have come."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.output import out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json

if TYPE_CHECKING:
    from projections.funnel.cohorts import Step

HOURS_MAX = 87_600
"""Ten years: more than any log is kept."""


def funnel(
    hours: Annotated[
        float, typer.Option("--hours", help="Of what was dispatched in the last so many hours.", min=0, max=HOURS_MAX)
    ] = 24.0,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Print how many were emitted, stored, dispatched, sent, acknowledged and read, by tenant, type and channel."""
    import uvloop

    from ops.cli.stores import stores
    from projections.funnel.counts import funnel as ask

    async def run() -> list[Step]:
        async with stores(folder, "seamark-funnel") as found:
            now = datetime.now(UTC)
            return await ask(found.pool, now - timedelta(hours=hours), now, tenant)

    steps = uvloop.run(run())
    if as_json:
        for step in steps:
            print_json(step)
        return
    if not steps:
        out.print(f"Nothing was dispatched in the last {hours:g} hours.")
    for step in steps:
        out.print("\n".join(drawn(step)), markup=False)


def drawn(step: Step, width: int = 40) -> list[str]:
    """A funnel as bars. `emitted` and `stored` count events, all below it notifications, one for each user of an event."""
    from projections.funnel.cohorts import STAGES

    counts = {stage: int(getattr(step, stage)) for stage in STAGES}
    widest = max(*counts.values(), 1)
    digits = len(str(widest))
    lines = [f"{step.tenant} · {step.type} · {step.channel}"]
    for stage, count in counts.items():
        # What there is shows, be it one in a million.
        bar = "█" * max(round(width * count / widest), 1 if count else 0)
        lines.append(f"  {stage:<12}  {count:>{digits}}  {bar}")
    return lines
