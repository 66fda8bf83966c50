"""The table of campaigns that simulations of pagers have answers like the real one."""

import random
from typing import Any

import msgspec

from engine.campaigns.commands import CampaignConflict, Campaigns
from engine.campaigns.cuts import Bounds, cut, remainder
from engine.campaigns.draft import Audience
from engine.campaigns.members import WINDOW_USERS
from engine.campaigns.states import Campaign, Page, PageState, Withheld
from engine.campaigns.table import CampaignTable
from engine.postgres import Pool
from tests.support.campaigns import AT, T, draft, join
from tests.support.pagersim import World

_last: dict[str, Any] = {}


async def test_the_simulated_table_answers_like_the_real_one(pool: Pool) -> None:
    """The same steps in both, drawn at random: each answer and every page is the same."""
    claimed = 0
    for seed in range(25):
        rng = random.Random(seed)
        id = f"c{seed}"
        world = World(seed, window=WINDOW_USERS)
        world.calm, world.placed[id] = True, {}
        real, simulated, commands = CampaignTable(pool), world.table, Campaigns(pool)
        simulated.campaigns.clear()
        users = sorted(f"u{n:03}" for n in rng.sample(range(200), 25))
        world.members[id], world.excluded[id] = set(users), set(rng.sample(users, 4))
        await pool.execute("DELETE FROM topic_members")
        await join(pool, "t", *users)
        await join(pool, "out", *world.excluded[id])
        await commands.create(T, draft(Audience(topic="t"), id, exclude=Audience(topic="out")))
        simulated.create(T, id, rate=None, start_at=0.0, not_after=None)
        for _ in range(40):
            one, other = await _both(real, simulated, id)
            if one is None or other is None:
                assert one is other, "one of them has nothing to do"
                if simulated.campaigns[T, id]["state"] != "paused":
                    break
                await commands.resume(T, id)
                simulated.command(T, id, state="running")
                continue
            assert _plain(one) == _plain(other)
            outcome = await _step(rng, world, pool, real, one), await _step_again(simulated, other)
            assert outcome[0] == outcome[1], f"seed {seed}"
            claimed += outcome[0] == ("claim", True)
        await pool.execute("DELETE FROM campaigns")
    assert claimed > 40


async def _both(real: CampaignTable, simulated: Any, id: str) -> tuple[Campaign | None, Campaign | None]:
    found = [{one.id: one for one in await table.lease("me", (), 16)}.get(id) for table in (real, simulated)]
    return found[0], found[1]


def _plain(campaign: Campaign) -> dict[str, Any]:
    said = msgspec.structs.asdict(campaign)
    for name in ("now", "publish_at", "audience", "exclude", "message"):
        said.pop(name)
    return said


async def _step(rng: random.Random, world: World, pool: Pool, real: CampaignTable, campaign: Campaign) -> Any:
    """One step on the real table, which `_step_again` makes on the other."""
    page = rng.choice(campaign.open) if campaign.open else None
    what = rng.choice(
        ["fix", "claim", "claim", "published", "heads", "done", "counted", "ambiguous", "close", "join", "change"]
    )
    if page is not None and rng.random() < 0.5:  # what fits goes on: else few pages would come far
        fitting = {"fixed": ("claim",), "publishing": ("published",), "published": ("heads", "done", "counted")}
        what = rng.choice(fitting[page.state])
    if what == "join":
        user = f"u{rng.randrange(200):03}"
        if user not in world.members[campaign.id]:
            world.members[campaign.id].add(user)
            await join(pool, "t", user)
    change = rng.choice(["pause", "resume", "resume", "resume", "cancel"])
    if what == "change" and change == "cancel" and rng.random() < 0.8:
        change = "resume"
    _last.update(what=what, number=page.number if page else None, change=change)
    if what == "change":
        try:
            await getattr(Campaigns(pool), change)(T, campaign.id)
        except CampaignConflict:
            return what, "conflict"
        return what, None
    return what, await _act(real, campaign, page, what)


async def _step_again(simulated: Any, campaign: Campaign) -> Any:
    what = _last["what"]
    page = next((page for page in campaign.open if page.number == _last["number"]), None)
    if what == "change":
        state = simulated.campaigns[T, campaign.id]
        target = {"pause": "paused", "resume": "running", "cancel": "cancelled"}[_last["change"]]
        if state["state"] != target:
            if state["finished"] or state["state"] not in ("running", "paused"):
                return what, "conflict"
            simulated.command(T, campaign.id, state=target)
        return what, None
    return what, await _act(simulated, campaign, page, what)


async def _act(table: Any, campaign: Campaign, page: Page | None, what: str) -> bool | None:
    small = Bounds(3, 1 << 20)
    if what == "fix":
        return await table.fix(campaign, cut(await table.window(campaign, campaign.cut_up_to, None), small))
    if what == "close":
        return await table.close(campaign)
    if page is None:
        return None
    if what == "claim":
        window = await table.window(campaign, page.after, page.up_to)
        piece = cut(window, small)
        event = (b"event", AT) if piece.recipients else (None, None)
        return await table.claim(campaign, page, piece, remainder(window, piece), *event)
    if what == "published":
        assert (await table.event(campaign, page) == b"event") == (page.state is PageState.PUBLISHING)
        return await table.published(campaign, page, AT)
    if what == "heads":
        return await table.note_heads(campaign, page, {"0": "e.1"})
    if what == "done":
        return await table.done(campaign, page, None)
    if what == "counted":
        return await table.done(campaign, page, Withheld(1, 1))
    if what == "ambiguous":
        return await table.ambiguous(campaign, page, "why")
    return None
