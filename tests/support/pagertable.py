"""The campaigns' table as pagers see it, in memory, on a clock that passes when everybody waits."""

import asyncio
import heapq
import itertools
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from engine.campaigns.cuts import Cut, Member, Window
from engine.campaigns.draft import Audience, Message
from engine.campaigns.states import (
    OPEN,
    PAGES_OF_CAMPAIGN,
    PAGES_OF_TENANT,
    UNDER_WAY,
    Campaign,
    CampaignState,
    Page,
    PageState,
    Position,
    Withheld,
)
from engine.campaigns.table import LEASE_SECONDS
from engine.errors import StoreUnavailable

if TYPE_CHECKING:
    from tests.support.pagersim import World

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
replace = msgspec.structs.replace


class Clock:
    """Time that passes when everybody waits."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def now(self) -> datetime:
        return BEGAN + timedelta(seconds=self.seconds)

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.seconds + seconds, next(self._numbers), future))
        await future

    def advance(self) -> None:
        """Wake the next sleeper."""
        while self._sleepers:
            at, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                self.seconds = max(self.seconds, at)
                future.set_result(None)
                return


class SimTable:
    """What `CampaignTable` promises, in memory; each method is one transaction."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.campaigns: dict[tuple[str, str], dict[str, Any]] = {}
        self.pages: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        self.away_until = 0.0

    # --- transactions ------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        await self.world.pass_time()
        if self.world.clock.seconds < self.away_until or self.world.fault(0.02):
            raise StoreUnavailable("no answer; nothing was done")

    async def _end(self) -> None:
        await self.world.pass_time()
        if self.world.fault(0.02):
            raise StoreUnavailable("no answer; it was done")

    async def lease(self, owner: str, busy: Collection[tuple[str, str]], most: int) -> list[Campaign]:
        await self._begin()
        now = self.world.clock.seconds
        found = []
        for key, row in self.campaigns.items():
            free = row["leased_until"] < now or row["leased_by"] == owner
            open_ = [page for page in self.pages[key].values() if page["state"] in OPEN]
            due = row["state"] != "running" or row["start_at"] <= now
            over = row["not_after"] is not None and row["not_after"] <= now
            due = due and (row["state"] != "paused" or over or any(page["state"] in UNDER_WAY for page in open_))
            if row["finished"] or not free or not due or key in busy or len(found) >= most:
                continue
            row.update(leased_by=owner, leased_until=now + LEASE_SECONDS)
            fixed = sorted((p for p in open_ if p["state"] == "fixed"), key=lambda p: p["number"])[:PAGES_OF_CAMPAIGN]
            shown = sorted([p for p in open_ if p["state"] in UNDER_WAY] + fixed, key=lambda p: p["number"])
            found.append(self._campaign(key, row, tuple(self._page(page) for page in shown)))
        await self._end()
        return found

    def _campaign(self, key: tuple[str, str], row: dict[str, Any], pages: tuple[Page, ...]) -> Campaign:
        clock = self.world.clock
        return Campaign(
            tenant=key[0],
            id=key[1],
            revision=row["revision"],
            state=CampaignState(row["state"]),
            audience=row["audience"],
            exclude=None,
            message=row["message"],
            rate=row["rate"],
            publish_at=BEGAN + timedelta(seconds=row["publish_at"]),
            not_after=None if row["not_after"] is None else BEGAN + timedelta(seconds=row["not_after"]),
            now=clock.now,
            cut_up_to=row["cut_up_to"],
            cut_final=row["cut_final"],
            pages=row["pages"],
            open=pages,
        )

    def _page(self, page: dict[str, Any]) -> Page:
        names = ("number", "after", "up_to", "count", "excluded", "at", "heads")
        return Page(state=PageState(page["state"]), **{name: page[name] for name in names})

    async def window(self, campaign: Campaign, after: str, up_to: str | None) -> Window:
        await self._begin()
        members, excluded = self.world.members[campaign.id], self.world.excluded[campaign.id]
        users = sorted(user for user in members if user > after and (up_to is None or user <= up_to))
        found = [Member(user, user in excluded) for user in users[: self.world.window]]
        await self._end()
        final = len(users) < self.world.window
        reached = found[-1].user if found else ""
        return Window(found, up_to if final and up_to is not None else reached, final)

    async def fix(self, campaign: Campaign, piece: Cut) -> bool:
        await self._begin()
        row = self._row(campaign)
        ok = (
            row["state"] == "running"
            and not row["cut_final"]
            and (row["pages"], row["cut_up_to"]) == (campaign.pages, campaign.cut_up_to)
        )
        if ok:
            row.update(cut_up_to=max(piece.up_to, row["cut_up_to"]), cut_final=piece.final)
            if piece.members:
                self._add(campaign, row["pages"], campaign.cut_up_to, piece.up_to, piece.members, piece.excluded)
                row["pages"] += 1
        await self._end()
        return ok

    async def claim(
        self, campaign: Campaign, page: Page, piece: Cut, rest: Cut, event: bytes | None, end: Position | None
    ) -> bool:
        await self._begin()
        row, now = self._row(campaign), self.world.clock.seconds
        pages = self.pages[campaign.tenant, campaign.id]
        stored = pages[page.number]
        of_tenant = [p for key, some in self.pages.items() if key[0] == campaign.tenant for p in some.values()]
        ok = (
            row["state"] == "running"
            and row["revision"] == campaign.revision
            and row["publish_at"] <= now
            and (row["not_after"] is None or row["not_after"] > now)
            and (stored["state"], stored["up_to"]) == ("fixed", page.up_to)
            and sum(p["state"] in UNDER_WAY for p in pages.values()) < PAGES_OF_CAMPAIGN
            and sum(p["state"] in UNDER_WAY for p in of_tenant) < PAGES_OF_TENANT
        )
        if ok:
            if event is not None and row["rate"]:
                row["publish_at"] = max(row["publish_at"], now - 1) + (piece.members - piece.excluded) / row["rate"]
            if piece.up_to != page.up_to:
                self.world.splits += 1
                self._add(campaign, row["pages"], piece.up_to, page.up_to, rest.members, rest.excluded)
                row["pages"] += 1
            stored.update(up_to=piece.up_to, count=piece.members, excluded=piece.excluded, event=event, at=end)
            stored["state"] = "done" if event is None else "publishing"
            self.world.claimed(campaign, piece)
        await self._end()
        return ok

    def _add(self, campaign: Campaign, number: int, after: str, up_to: str, count: int, excluded: int) -> None:
        self.pages[campaign.tenant, campaign.id][number] = {
            "number": number,
            "after": after,
            "up_to": up_to,
            "state": "fixed",
            "count": count,
            "excluded": excluded,
            "at": None,
            "heads": None,
            "event": None,
            "cancelled": 0,
            "expired": 0,
        }

    async def event(self, campaign: Campaign, page: Page) -> bytes | None:
        await self._begin()
        stored = self.pages[campaign.tenant, campaign.id][page.number]
        await self._end()
        return stored["event"] if stored["state"] == "publishing" else None

    async def published(self, campaign: Campaign, page: Page, at: Position) -> bool:
        return await self._change(campaign, page, "publishing", state="published", at=at, event=None)

    async def note_heads(self, campaign: Campaign, page: Page, heads: dict[str, str]) -> bool:
        return await self._change(campaign, page, "published", heads=heads)

    async def done(self, campaign: Campaign, page: Page, withheld: Withheld | None) -> bool:
        await self._begin()
        stored = self.pages[campaign.tenant, campaign.id][page.number]
        unseen = withheld is None and self._row(campaign)["state"] == "cancelled"
        ok = stored["state"] == "published" and not unseen
        if ok:
            cancelled, expired = withheld or (0, 0)
            stored.update(state="done", cancelled=cancelled, expired=expired)
            self.world.page_changed(campaign.id, stored)
        await self._end()
        return ok

    async def ambiguous(self, campaign: Campaign, page: Page, reason: str) -> bool:
        return await self._change(campaign, page, page.state, state="ambiguous", event=None)

    async def _change(self, campaign: Campaign, page: Page, expected: str, **changes: Any) -> bool:
        await self._begin()
        stored = self.pages[campaign.tenant, campaign.id][page.number]
        ok = stored["state"] == expected
        if ok:
            stored.update(changes)
            self.world.page_changed(campaign.id, stored)
        await self._end()
        return ok

    async def expire(self, campaign: Campaign) -> bool:
        await self._begin()
        row, now = self._row(campaign), self.world.clock.seconds
        ok = row["state"] in ("running", "paused") and row["revision"] == campaign.revision and row["not_after"] <= now
        if ok:
            self.command(campaign.tenant, campaign.id, state="expired")
        await self._end()
        return ok

    async def close(self, campaign: Campaign) -> bool:
        await self._begin()
        row = self._row(campaign)
        open_ = any(page["state"] in OPEN for page in self.pages[campaign.tenant, campaign.id].values())
        over = row["state"] in ("cancelled", "expired") or (row["state"] == "running" and row["cut_final"])
        ok = row["revision"] == campaign.revision and not row["finished"] and over and not open_
        if ok:
            row.update(finished=True, state="done" if row["state"] == "running" else row["state"])
        await self._end()
        return ok

    def _row(self, campaign: Campaign) -> dict[str, Any]:
        return self.campaigns[campaign.tenant, campaign.id]

    # --- what commands do --------------------------------------------------------------------------------------------

    def create(self, tenant: str, id: str, *, rate: int | None, start_at: float, not_after: float | None) -> None:
        row = {"state": "running", "revision": 1, "finished": False, "leased_by": "", "leased_until": -1.0}
        row |= {"audience": Audience(topic="t"), "message": Message(type="sim.n"), "rate": rate}
        row |= {"start_at": start_at, "publish_at": start_at, "not_after": not_after}
        row |= {"cut_up_to": "", "cut_final": False, "pages": 0}
        self.campaigns[tenant, id], self.pages[tenant, id] = row, {}

    def command(self, tenant: str, id: str, **changes: Any) -> None:
        """Change a campaign as `Campaigns` does, at once."""
        row = self.campaigns[tenant, id]
        if row["finished"] or row["state"] in ("cancelled", "expired", "done"):
            return
        row.update(changes, revision=row["revision"] + 1)
        if row["state"] in ("cancelled", "expired"):
            for page in self.pages[tenant, id].values():
                if page["state"] == "fixed":
                    page["state"] = row["state"]
