"""`seamark pager`: the role that brings campaigns onto BULK, page by page."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from engine.settings import Settings, load_settings

if TYPE_CHECKING:
    from engine.campaigns.commands import Campaigns
    from ops.process import Health

POOL_CONNECTIONS_MAX = 8
"""Campaigns whose tables are read or changed at once; more of them wait for a connection."""

REMOVE_SECONDS = 600.0
"""How often campaigns that were finished long ago are removed, a hundred at a time."""


def pager(
    planned: Annotated[
        bool,
        typer.Option(
            "--planned/--not-planned",
            help="Whether planners are run here: then a page is done once they have passed it.",
        ),
    ] = True,
) -> None:
    """Run a pager. Start two or more: each works on the campaigns that no other one holds."""
    from ops.process import run_role

    settings = load_settings()
    sys.exit(run_role("pager", settings, lambda stop, health: _page(settings, stop, health, planned=planned)))


async def _page(settings: Settings, stop: asyncio.Event, health: Health, *, planned: bool) -> None:
    from engine.campaigns.bulk import Bulk
    from engine.campaigns.commands import Campaigns
    from engine.campaigns.pager import Pager
    from engine.campaigns.planners import JobsPlanners
    from engine.campaigns.table import CampaignTable
    from engine.log.incarnations import read_partitions
    from engine.tasks import end, run_until
    from ops.process import database, stores
    from projections.inbox.withheld import WithheldRecords

    async with (
        database(settings, POOL_CONNECTIONS_MAX, "campaigns are kept in PostgreSQL") as pool,
        stores("pager", settings, health) as (broker, _),
    ):
        partitions = await read_partitions(broker, settings.partitions)
        work = Pager(
            CampaignTable(pool),
            Bulk(broker, partitions),
            planners=JobsPlanners(broker) if planned else None,
            folds=WithheldRecords(pool),
        )
        removing = asyncio.create_task(_remove_old(Campaigns(pool)), name="remove old campaigns")
        try:
            await run_until(stop, work.run(), "pager")
        finally:
            await end(removing)


async def _remove_old(campaigns: Campaigns) -> None:
    import structlog

    from engine.errors import StoreUnavailable

    while True:
        try:
            await campaigns.remove_old()
        except StoreUnavailable as error:
            structlog.get_logger("seamark.pager").warning("campaigns_not_removed", error=str(error))
        await asyncio.sleep(REMOVE_SECONDS)
