"""Pagers in worlds by the thousand: whatever is lost, late, stale or killed, everybody gets a campaign once.

SEAMARK_WORLDS=10000 runs so many instead of a few hundred.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from engine.campaigns import cuts, pager
from engine.campaigns.bulk import Bulk
from engine.campaigns.cuts import Cut
from engine.campaigns.pager import Pager
from engine.campaigns.states import Dispatched, Page, Position, Step, Withheld
from engine.campaigns.states import steps as right_steps
from tests.support.pagersim import World

WORLDS = int(os.environ.get("SEAMARK_WORLDS", "150"))
MUTANT_WORLDS = 400


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of four, so that audiences of thirty are cut many times and grow beyond them."""
    monkeypatch.setattr(cuts, "RECIPIENTS_MAX", 4)


async def violations(seeds: range) -> dict[int, list[str]]:
    found = {}
    for seed in seeds:
        world = World(seed)
        await asyncio.wait_for(world.run(), 30)
        if world.faults:
            found[seed] = world.faults
    return found


@pytest.mark.timeout(180 + WORLDS // 5)
async def test_whatever_is_lost_late_stale_or_killed_everybody_gets_a_campaign_once() -> None:
    assert await violations(range(WORLDS)) == {}


async def test_the_simulated_worlds_are_wild_enough() -> None:
    states: list[str] = []
    splits = kills = 0
    for seed in range(100):
        world = World(seed)
        await world.run()
        kills, splits = kills + world.kills, splits + world.splits
        for key, row in world.table.campaigns.items():
            states += [row["state"], *(page["state"] for page in world.table.pages[key].values())]
    assert {"done", "cancelled", "expired", "ambiguous", "paused"} <= set(states)
    assert splits > 20, "pages grew before they were published, and were split"
    assert kills > 100


async def published_before_it_was_claimed(self: Pager, campaign: Any, page: Page) -> None:
    bulk = await self._bulk.state()
    window = await self._table.window(campaign, page.after, page.up_to)
    piece = cuts.cut(window, pager._bounds(campaign, campaign.rate))
    if not piece.recipients:
        await self._table.claim(campaign, page, piece, cuts.remainder(window, piece), None, None)
        return
    event = pager._event(campaign, page, piece)
    end = Position(bulk.epoch or "", bulk.last_seq)
    at = await self._bulk.store(event.subject, event.payload, end.epoch)
    if await self._table.claim(campaign, page, piece, cuts.remainder(window, piece), event.payload, end):
        await self._table.published(campaign, page, at)


async def stored_whatever_is_there(self: Bulk, subject: str, payload: bytes, epoch: str) -> Position:
    ack = await self._broker.append(subject, payload)
    return Position(epoch, ack.seq)


async def done_when_dispatched(self: Pager, campaign: Any, page: Page) -> None:
    self._planners = None
    await right_finish(self, campaign, page)


async def heads_noted_too_early(self: Pager, campaign: Any, page: Page) -> None:
    if page.heads is None and self._planners is not None:
        await self._table.note_heads(campaign, page, await self._bulk.heads())
        return
    await right_finish(self, campaign, page)


async def done_when_published(self: Pager, campaign: Any, page: Page) -> None:
    await self._table.done(campaign, page, Withheld(0, 0))


async def not_counted(self: Pager, campaign: Any, page: Page) -> None:
    self._folds = NothingWithheld()
    await right_finish(self, campaign, page)


class NothingWithheld:
    async def withheld(self, *_: Any) -> Withheld:
        return Withheld(0, 0)


async def doubt_taken_for_loss(self: Pager, campaign: Any, page: Page) -> None:
    if await self._bulk.find(pager._subject(campaign, page)) is None:
        await self._give_up(campaign, page, "")
        return
    await right_settle(self, campaign, page)


async def doubt_taken_for_success(self: Pager, campaign: Any, page: Page) -> None:
    bulk = await self._bulk.state()
    await self._table.published(campaign, page, Position(bulk.epoch or "", bulk.last_seq))


def not_split(window: Any, most: Any) -> Cut:
    piece = right_cut(window, most)
    return piece._replace(up_to=window.reached) if window.reached else piece


def paused_left_alone(campaign: Any, *, room: bool) -> Any:
    return () if campaign.state == "paused" else right_steps(campaign, room=room)


def closed_when_all_is_published(campaign: Any, *, room: bool) -> Any:
    return [step for step in right_steps(campaign, room=room) if step[0] is not Step.FINISH]


right_finish, right_settle, right_cut = Pager._finish, Pager._settle, cuts.cut


@pytest.mark.parametrize(
    ("target", "name", "mistake"),
    [
        (Pager, "_publish", published_before_it_was_claimed),
        (Bulk, "store", stored_whatever_is_there),
        (Pager, "_finish", done_when_dispatched),
        (Pager, "_finish", heads_noted_too_early),
        (Pager, "_finish", done_when_published),
        (pager, "dispatched", lambda at, mark, bulk: Dispatched.YES),
        (pager, "reaches_back", lambda page, bulk: True),
        (Pager, "_settle", doubt_taken_for_loss),
        (Pager, "_settle", doubt_taken_for_success),
        (pager, "cut", not_split),
        (pager, "steps", paused_left_alone),
        (pager, "steps", closed_when_all_is_published),
        (pager, "may_be_withheld", lambda campaign: False),
        (Pager, "_finish", not_counted),
    ],
    ids=[
        "boundaries-after-publish",
        "no-expected-sequence",
        "planner-not-awaited",
        "heads-too-early",
        "done-when-published",
        "mark-not-read",
        "trimmed-taken-for-never-stored",
        "doubt-taken-for-loss",
        "doubt-taken-for-success",
        "grown-page-not-split",
        "paused-not-settled",
        "pages-never-finished",
        "cancelled-page-not-counted",
        "withheld-taken-for-none",
    ],
)
async def test_every_mistake_of_a_pager_is_noticed(
    target: Any, name: str, mistake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, mistake)
    for start in range(0, MUTANT_WORLDS, 4):
        if await violations(range(start, start + 4)):
            return
    pytest.fail("no world noticed")
