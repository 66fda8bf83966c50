"""The pager: brings campaigns onto BULK page by page. Any number may run; whoever holds a campaign's lease works on it.

The lease only saves double work. What is promised holds without it: every change of the tables compares before it sets, and BULK
takes the event of a page once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog

from engine import failpoints
from engine.campaigns.bulk import Bulk
from engine.campaigns.cuts import Bounds, Cut, bounds, cut, remainder
from engine.campaigns.draft import event_id, page_event
from engine.campaigns.states import (
    Campaign,
    Dispatched,
    Page,
    Position,
    Step,
    Withheld,
    dispatched,
    may_be_withheld,
    reaches_back,
    steps,
)
from engine.campaigns.table import CampaignTable
from engine.errors import StoreBroken
from engine.tasks import Tasks
from seamark.protocol.errors import InvalidEvent, SeamarkError
from seamark.protocol.events import Encoded
from seamark.protocol.subjects import bulk_subject

_log = structlog.get_logger("seamark.pager")

LOOK_SECONDS: Final = 0.25
"""How often campaigns are looked at: a change by command takes effect within a second, and a look costs one statement."""

RETRY_SECONDS: Final = 1.0
"""A campaign with which something failed is left alone for so long."""

CAMPAIGNS_AT_A_TIME: Final = 16
"""Campaigns that one process works on at a time: each may hold an event of 1 MiB and a connection."""

_LONGEST_NUMBER: Final = 10**9


class Planners(Protocol):
    """What is behind the logs, where notifications are planned."""

    async def has_room(self) -> bool:
        """Whether more may be begun now."""

    async def passed(self, heads: dict[str, str]) -> bool:
        """Whether every planner has passed these."""


class Folds(Protocol):
    """What the inbox says of pages."""

    async def withheld(self, tenant: str, event: str, heads: dict[str, str]) -> Withheld | None:
        """How many records of an event are withheld; None: the inbox is not folded up to these heads yet."""


class Pager:
    """All campaigns, as far as this process gets them.

    Args:
        planners: None: nothing is planned in this installation, so a page is done when it is dispatched.
        folds: None: nothing is cancelled or over while it is sent, or nobody wants to know of how many that is true.
        sleep: how to wait; simulations pass their own.
    """

    def __init__(
        self,
        table: CampaignTable,
        bulk: Bulk,
        *,
        planners: Planners | None = None,
        folds: Folds | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._table = table
        self._bulk = bulk
        self._planners = planners
        self._folds = folds
        self._sleep = sleep
        self._owner = secrets.token_hex(8)
        self._tasks = Tasks()
        self._busy: set[tuple[str, str]] = set()
        self._fault: Exception | None = None

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            StoreBroken: the tables are not what this process needs. What nobody foresaw ends it, too.
        """
        try:
            while self._fault is None:
                await self._look()
                await self._sleep(LOOK_SECONDS)
            raise self._fault
        finally:
            await self._tasks.end()

    async def _look(self) -> None:
        """Take up the campaigns whose turn it is."""
        try:
            found = await self._table.lease(self._owner, self._busy, CAMPAIGNS_AT_A_TIME - len(self._busy))
        except StoreBroken:
            raise
        except SeamarkError as error:
            _log.warning("campaigns_not_read", error=f"{type(error).__name__}: {error}")
            return
        for campaign in found:
            self._busy.add((campaign.tenant, campaign.id))
            self._tasks.begin(self._work_on(campaign), f"campaign {campaign.tenant}/{campaign.id}")

    async def _work_on(self, campaign: Campaign) -> None:
        try:
            room = self._planners is None or await self._planners.has_room()
            for step, page in steps(campaign, room=room):
                await self._take(step, campaign, page)
        except SeamarkError as error:
            if isinstance(error, StoreBroken):
                self._fault = error
                return
            _log.warning(
                "campaign_waits", tenant=campaign.tenant, campaign=campaign.id, error=f"{type(error).__name__}: {error}"
            )
            await self._sleep(RETRY_SECONDS)
        except Exception as error:
            self._fault = error
        finally:
            self._busy.discard((campaign.tenant, campaign.id))

    async def _take(self, step: Step, campaign: Campaign, page: Page | None) -> None:
        match step, page:
            case Step.SETTLE, Page():
                await self._settle(campaign, page)
            case Step.FINISH, Page():
                await self._finish(campaign, page)
            case Step.PUBLISH, Page():
                try:
                    most = _bounds(campaign, campaign.rate)
                except InvalidEvent as error:
                    await self._fail(campaign, page, error)
                else:
                    await self._publish(campaign, page, most)
            case Step.CUT, None:
                await self._cut(campaign)
            case Step.EXPIRE, None:
                await self._table.expire(campaign)
            case Step.CLOSE, None:
                await self._table.close(campaign)

    async def _cut(self, campaign: Campaign) -> None:
        """Fix the boundaries of the next page."""
        window = await self._table.window(campaign, campaign.cut_up_to, None)
        try:
            # Whatever the rate is now: it may be raised, and then pages of a few users would be a rate of their own.
            most = _bounds(campaign, None)
        except InvalidEvent:
            most = bounds(0, 0, None)  # with this page the campaign will fail when its turn comes
        await self._table.fix(campaign, cut(window, most))

    async def _publish(self, campaign: Campaign, page: Page, most: Bounds) -> None:
        """Claim a page of at most so many with its event, append that, and say where it is."""
        # Read before the claim: whatever is appended for it comes behind this.
        bulk = await self._bulk.state()
        window = await self._table.window(campaign, page.after, page.up_to)
        piece = cut(window, most)
        rest = remainder(window, piece)
        if not piece.recipients:
            await self._table.claim(campaign, page, piece, rest, None, None)
            return
        event = _event(campaign, page, piece)
        end = Position(bulk.epoch or "", bulk.last_seq)
        if not await self._table.claim(campaign, page, piece, rest, event.payload, end):
            return
        failpoints.reach("after-page-claimed")
        at = await self._bulk.store(event.subject, event.payload, end.epoch)
        failpoints.reach("after-page-stored")
        await self._table.published(campaign, page, at)

    async def _settle(self, campaign: Campaign, page: Page) -> None:
        """A page that may be in BULK: it is there, or is appended again, or nobody can tell any more."""
        subject = _subject(campaign, page)
        found = await self._bulk.find(subject)
        # Read afterwards: had the page been there and been trimmed, BULK would begin later now.
        bulk = await self._bulk.state()
        if found is not None:
            await self._table.published(campaign, page, Position(bulk.epoch or "", found))
            return
        if not reaches_back(page, bulk):
            await self._give_up(campaign, page, "BULK does not reach back to when the page was published")
            return
        payload = await self._table.event(campaign, page)
        if payload is not None:  # else somebody has settled it meanwhile
            at = await self._bulk.store(subject, payload, bulk.epoch or "")
            await self._table.published(campaign, page, at)

    async def _finish(self, campaign: Campaign, page: Page) -> None:
        """A page whose event is in BULK is done once it is dispatched and every planner has passed what came of it.

        Where some of it may be withheld it is counted first how much, which the inbox knows.
        """
        assert page.at is not None
        count = self._folds is not None and may_be_withheld(campaign)
        if page.heads is None:
            mark = await self._bulk.home_mark(_subject(campaign, page))
            verdict = dispatched(page.at, mark, await self._bulk.state())
            if verdict is Dispatched.UNKNOWN:
                await self._give_up(campaign, page, "BULK was made anew, or lost this page in a restore")
            elif verdict is Dispatched.YES and self._planners is None and not count:
                await self._table.done(campaign, page, None)
            elif verdict is Dispatched.YES:
                # Read once it is dispatched: all its records lie before these.
                await self._table.note_heads(campaign, page, await self._bulk.heads())
        elif self._planners is None or await self._planners.passed(page.heads):
            withheld = None
            if self._folds is not None and count:
                event = event_id(campaign.id, page.number)
                withheld = await self._folds.withheld(campaign.tenant, event, page.heads)
            if withheld is not None or not count:
                await self._table.done(campaign, page, withheld)

    async def _fail(self, campaign: Campaign, page: Page, error: InvalidEvent) -> None:
        """End a campaign whose event can never be published, however often that is tried."""
        if await self._table.fail(campaign, str(error)):
            _log.error(
                "campaign_failed",
                tenant=campaign.tenant,
                campaign=campaign.id,
                page=page.number,
                why=str(error),
                remedy="start another campaign, for those who are not among `stored`",
            )

    async def _give_up(self, campaign: Campaign, page: Page, reason: str) -> None:
        if await self._table.ambiguous(campaign, page, reason):
            _log.error(
                "page_ambiguous",
                tenant=campaign.tenant,
                campaign=campaign.id,
                page=page.number,
                why=reason,
                remedy="`seamark prove` says of a user of this page whether he was notified",
            )


def _bounds(campaign: Campaign, rate: int | None) -> Bounds:
    """What a page may hold; InvalidEvent where the campaign's event can never be published, whoever is named in it."""
    inside = {"after": "", "up_to": ""}
    empty = page_event(campaign.tenant, campaign.id, campaign.message, _LONGEST_NUMBER, ["-"], stored=True, **inside)
    return bounds(len(empty.payload), len(bytes(campaign.message.data)), rate)


def _event(campaign: Campaign, page: Page, piece: Cut) -> Encoded:
    inside = {"after": page.after, "up_to": piece.up_to}
    return page_event(
        campaign.tenant, campaign.id, campaign.message, page.number, piece.recipients, stored=True, **inside
    )


def _subject(campaign: Campaign, page: Page) -> str:
    return bulk_subject(campaign.tenant, event_id(campaign.id, page.number), campaign.message.type)
