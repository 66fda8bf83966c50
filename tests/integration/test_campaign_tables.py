"""Campaigns in a real PostgreSQL: what the simulation of pagers takes for granted holds there, statement by statement."""

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from engine.campaigns.commands import CampaignConflict, Campaigns, NoCampaign, Size, TooManyCampaigns
from engine.campaigns.cuts import Bounds, Cut, cut, remainder
from engine.campaigns.draft import Audience, Condition, Draft, InvalidCampaign
from engine.campaigns.states import PAGES_OF_CAMPAIGN, Campaign, Page, PageState, Withheld
from engine.campaigns.table import CampaignTable
from engine.postgres import Pool
from tests.support.campaigns import AT, MESSAGE, T, draft, join

FOUR = Bounds(4, 1 << 20)


async def add_users(pool: Pool, users: dict[str, dict[str, Any]], tenant: str = T) -> None:
    await pool.executemany(
        "INSERT INTO users (tenant, user_id, locale, attributes, version) VALUES ($1, $2, $3, $4, 1)",
        [(tenant, user, said.pop("locale", None), msgspec.json.encode(said).decode()) for user, said in users.items()],
    )


async def taken(table: CampaignTable, id: str = "c0") -> Campaign:
    return {one.id: one for one in await table.lease("me", (), 16)}[id]


async def fixed(table: CampaignTable, most: Bounds = FOUR) -> Campaign:
    """The campaign once all its pages are cut."""
    while True:
        campaign = await taken(table)
        if campaign.cut_final:
            return campaign
        assert await table.fix(campaign, cut(await table.window(campaign, campaign.cut_up_to, None), most))


async def claim(table: CampaignTable, campaign: Campaign, page: Page, most: Bounds = FOUR) -> bool:
    window = await table.window(campaign, page.after, page.up_to)
    piece = cut(window, most)
    return await table.claim(campaign, page, piece, remainder(window, piece), b"event", AT)


async def users_of(table: CampaignTable, id: str = "c0") -> list[str]:
    """Everybody on any page, in order."""
    campaign = await taken(table, id)
    window = await table.window(campaign, "", None)
    return [member.user for member in window.members if not member.excluded]


# --- audiences -----------------------------------------------------------------------------------------------------------

PEOPLE: dict[str, dict[str, Any]] = {
    "anna": {"plan": "pro", "age": 41, "locale": "de"},
    "bob": {"plan": "free", "age": 7},
    "Carl": {"plan": "pro", "beta": True, "locale": "en"},
    "dora": {"age": "41"},
    "Émile": {"plan": None, "tags": ["a"]},
}


SEGMENTS: list[tuple[str, Any, Any, set[str]]] = [
    ("plan", "eq", "pro", {"anna", "Carl"}),
    ("plan", "ne", "pro", {"bob", "dora", "Émile"}),
    ("plan", "in", ["free", "pro"], {"anna", "bob", "Carl"}),
    ("plan", "exists", True, {"anna", "bob", "Carl"}),
    ("plan", "exists", False, {"dora", "Émile"}),
    ("age", "ge", 7, {"anna", "bob"}),
    ("age", "lt", 41, {"bob"}),
    ("age", "le", "41", {"dora"}),
    ("age", "gt", 41.5, set()),
    ("age", "eq", 41.0, {"anna"}),
    ("beta", "eq", True, {"Carl"}),
    ("beta", "eq", 1, set()),
    ("locale", "eq", "de", {"anna"}),
    ("locale", "exists", False, {"bob", "dora", "Émile"}),
    ("tags", "in", ["a"], set()),
    ("plan') OR true --", "exists", True, set()),
]


async def test_a_segment_holds_those_who_meet_its_conditions(pool: Pool) -> None:
    await add_users(pool, {user: dict(said) for user, said in PEOPLE.items()})
    await add_users(pool, {"eve": {"plan": "pro"}}, tenant="other")
    commands, table = Campaigns(pool), CampaignTable(pool)
    for number, (attribute, op, value, found) in enumerate(SEGMENTS):
        asked = draft(Audience(segment=(Condition(attribute, op, value),)), f"c{number}")
        await commands.create(T, asked)
        assert set(await users_of(table, asked.id)) == found, asked
        assert await commands.size(T, asked) == Size(len(found), 0)
        await pool.execute("DELETE FROM campaigns")


async def test_all_conditions_of_a_segment_must_be_met(pool: Pool) -> None:
    await add_users(pool, {user: dict(said) for user, said in PEOPLE.items()})
    audience = Audience(segment=(Condition("plan", "eq", "pro"), Condition("age", "ge", 1)))
    assert await Campaigns(pool).size(T, draft(audience)) == Size(1, 0)


AUDIENCES: list[tuple[Audience, Audience | None, list[str]]] = [
    (Audience(everyone=True), None, ["Carl", "anna", "bob", "dora", "Émile"]),
    (Audience(topic="news"), None, ["Zoe", "anna", "ümit"]),
    (Audience(users=("b", "a", "b", "Z")), None, ["Z", "a", "b"]),
    (Audience(everyone=True), Audience(topic="news"), ["Carl", "bob", "dora", "Émile"]),
    (Audience(topic="news"), Audience(users=("anna", "nobody")), ["Zoe", "ümit"]),
    (Audience(everyone=True), Audience(segment=(Condition("plan", "eq", "pro"),)), ["bob", "dora", "Émile"]),
    (Audience(users=("a", "anna")), Audience(segment=(Condition("age", "exists", True),)), ["a"]),
]


async def test_an_audience_is_read_in_byte_order_without_those_who_are_excluded(pool: Pool) -> None:
    await add_users(pool, {user: dict(said) for user, said in PEOPLE.items()})
    await join(pool, "news", "anna", "ümit", "Zoe")
    await join(pool, "news", "mallory", tenant="other")
    commands, table = Campaigns(pool), CampaignTable(pool)
    for number, (audience, exclude, found) in enumerate(AUDIENCES):
        asked = draft(audience, f"c{number}", exclude=exclude)
        await commands.create(T, asked)
        assert await users_of(table, asked.id) == found == sorted(found)
        assert (await commands.size(T, asked)).recipients == len(found)
        await pool.execute("DELETE FROM campaigns")


async def test_a_forecast_counts_and_shows_nobody_whom_no_event_may_name(pool: Pool) -> None:
    stored = ("anna", "bob", "segment:x", "topic:y")  # earlier versions let the last two be
    await add_users(pool, {user: {} for user in stored})
    await join(pool, "news", *stored)
    commands, table = Campaigns(pool), CampaignTable(pool)
    for number, audience in enumerate((Audience(everyone=True), Audience(topic="news"))):
        for exclude, found in ((None, ["anna", "bob"]), (Audience(users=("bob",)), ["anna"])):
            asked = draft(audience, f"c{number}{len(found)}", exclude=exclude)
            await commands.create(T, asked)
            assert await users_of(table, asked.id) == found
            assert await commands.size(T, asked) == Size(4, 4 - len(found))
            assert sorted(await commands.sample(T, asked, 10)) == found


async def test_a_user_who_was_deleted_is_not_brought_back_by_a_campaign_that_names_him(pool: Pool) -> None:
    await pool.execute("INSERT INTO profiles (tenant, user_id, version, deleted_at) VALUES ($1, 'gone', 2, now())", T)
    await Campaigns(pool).create(T, draft(Audience(users=("gone", "here"))))
    assert await users_of(CampaignTable(pool)) == ["here"]


async def test_pages_of_a_real_audience_are_disjoint_and_leave_nobody_out(pool: Pool) -> None:
    names = [f"{chr(65 + n % 58)}{n}é" for n in range(37)]
    await join(pool, "news", *names)
    await Campaigns(pool).create(T, draft(Audience(topic="news")))
    await fixed(CampaignTable(pool))
    rows = await pool.fetch("SELECT after_user, up_to, count FROM campaign_pages ORDER BY number")
    assert [row["after_user"] for row in rows] == ["", *(row["up_to"] for row in rows[:-1])]
    assert [row["count"] for row in rows] == [4] * 9 + [1]
    assert rows[-1]["up_to"] == max(names)


# --- changes -------------------------------------------------------------------------------------------------------------


async def ready(pool: Pool, count: int = 40, most: Bounds = FOUR, **more: Any) -> tuple[CampaignTable, Campaign]:
    await join(pool, "news", *(f"u{n:03}" for n in range(count)))
    await Campaigns(pool).create(T, draft(Audience(topic="news"), **more))
    table = CampaignTable(pool)
    return table, await fixed(table, most)


async def test_of_two_who_claim_a_page_one_gets_it(postgres: str) -> None:
    async with asyncpg.create_pool(postgres, min_size=4, max_size=4) as pool:
        table, campaign = await ready(pool)
        claims = [claim(table, campaign, campaign.open[0]) for _ in range(4)]
        assert sorted(await asyncio.gather(*claims)) == [False, False, False, True]


async def test_no_more_pages_are_under_way_than_may_be_even_where_all_claim_at_once(postgres: str) -> None:
    async with asyncpg.create_pool(postgres, min_size=6, max_size=6) as pool:
        table, campaign = await ready(pool)
        rows = await pool.fetch("SELECT number, after_user, up_to FROM campaign_pages ORDER BY number")
        page = campaign.open[0]
        pages = [
            msgspec.structs.replace(page, number=row["number"], after=row["after_user"], up_to=row["up_to"])
            for row in rows
        ]
        claimed = await asyncio.gather(*(claim(table, campaign, one) for one in pages))
        assert sum(claimed) == PAGES_OF_CAMPAIGN


@pytest.mark.parametrize("change", ["pause", "cancel"])
async def test_nothing_is_claimed_once_a_campaign_is_held_up(change: str, pool: Pool) -> None:
    table, campaign = await ready(pool)
    await getattr(Campaigns(pool), change)(T, "c0")
    assert not await claim(table, campaign, campaign.open[0])
    if change == "pause":
        await Campaigns(pool).resume(T, "c0")
        assert not await claim(table, campaign, campaign.open[0]), "what was seen before the pause is seen anew"
        assert await claim(table, await taken(table), campaign.open[0])


async def test_a_rate_makes_the_next_page_wait_and_a_new_one_does_not(pool: Pool) -> None:
    forty = Bounds(40, 1 << 20)
    table, campaign = await ready(pool, 80, forty, rate=1)
    assert await claim(table, campaign, campaign.open[0], forty)
    campaign = await taken(table)
    assert timedelta(seconds=20) < campaign.publish_at - campaign.now < timedelta(seconds=40)
    assert not await claim(table, campaign, campaign.open[1], forty)
    await Campaigns(pool).set_rate(T, "c0", 1000)
    campaign = await taken(table)
    assert await claim(table, campaign, campaign.open[1], forty)


async def test_the_rate_said_again_lets_no_page_go_early(pool: Pool) -> None:
    table, _ = await ready(pool, rate=1)
    assert await claim(table, (await taken(table)), (await taken(table)).open[0])
    before = (await taken(table)).publish_at
    await Campaigns(pool).set_rate(T, "c0", 1)
    assert (await taken(table)).publish_at == before


async def test_a_campaign_that_nobody_would_ever_get_is_refused_unless_it_was_there_before(pool: Pool) -> None:
    commands, past = Campaigns(pool), datetime.now(UTC) - timedelta(seconds=1)
    late, message = draft(Audience(everyone=True), not_after=past), msgspec.structs.replace(MESSAGE, expires_at=past)
    over = Draft(id="c1", audience=Audience(everyone=True), message=message)
    for asked, member in ((late, "not_after"), (over, "message.expires_at")):
        for ask in (commands.create, commands.size):
            with pytest.raises(InvalidCampaign) as refused:
                await ask(T, asked)
            assert refused.value.field == member
    assert await commands.create(T, draft(Audience(everyone=True)))
    await pool.execute("UPDATE campaigns SET fingerprint = $1", hashlib.sha256(msgspec.json.encode(late)).digest())
    assert not await commands.create(T, late), "asked for again, it is the one that is there"


async def test_a_page_that_is_done_without_a_look_at_what_is_withheld_is_not_where_its_campaign_is_cancelled(
    pool: Pool,
) -> None:
    table, campaign = await ready(pool)
    page = campaign.open[0]
    assert await claim(table, campaign, page)
    assert await table.published(campaign, page, AT)
    await Campaigns(pool).cancel(T, "c0")
    assert not await table.done(campaign, page, None)
    assert await table.done(campaign, page, Withheld(3, 9))
    progress = await Campaigns(pool).progress(T, "c0")
    assert (progress.stored, progress.cancelled, progress.expired) == (0, 39, 1), "never more than there are"


async def test_a_campaign_begins_at_its_time(pool: Pool) -> None:
    await join(pool, "news", "alice")
    later = datetime.now(UTC) + timedelta(hours=1)
    await Campaigns(pool).create(T, draft(Audience(topic="news"), start_at=later))
    assert await CampaignTable(pool).lease("me", (), 16) == []
    await Campaigns(pool).set_rate(T, "c0", 5)
    publish_at = await pool.fetchval("SELECT publish_at FROM campaigns")
    assert publish_at == later, "a new rate does not begin it"
    await pool.execute("UPDATE campaigns SET start_at = now(), publish_at = now()")
    assert [one.id for one in await CampaignTable(pool).lease("me", (), 16)] == ["c0"]


async def test_a_leased_campaign_is_left_to_its_pager_until_that_is_silent(pool: Pool) -> None:
    table, _ = await ready(pool)
    assert await table.lease("another", (), 16) == []
    assert await table.lease("me", {(T, "c0")}, 16) == [], "it is worked on already"
    await pool.execute("UPDATE campaigns SET leased_until = now() - interval '1 millisecond'")
    assert [one.id for one in await table.lease("another", (), 16)] == ["c0"]


async def test_tenants_take_turns(pool: Pool) -> None:
    commands = Campaigns(pool)
    for number in range(6):
        await commands.create("big", draft(Audience(everyone=True), f"b{number}"))
    await commands.create("small", draft(Audience(everyone=True), "s0"))
    found = await CampaignTable(pool).lease("me", (), 2)
    assert {one.tenant for one in found} == {"big", "small"}


async def test_a_page_that_grew_is_split_when_it_is_claimed(pool: Pool) -> None:
    table, campaign = await ready(pool, 4)
    await join(pool, "news", "u0005", "u0006", "u0007")
    assert await claim(table, campaign, campaign.open[0])
    rows = await pool.fetch("SELECT number, after_user, up_to, count, state FROM campaign_pages ORDER BY number")
    assert [tuple(row) for row in rows] == [(0, "", "u0007", 4, "publishing"), (1, "u0007", "u003", 3, "fixed")]


async def test_the_event_of_a_page_is_kept_until_it_is_known_to_be_published(pool: Pool) -> None:
    table, campaign = await ready(pool)
    page = campaign.open[0]
    assert await claim(table, campaign, page)
    assert await table.event(campaign, page) == b"event"
    assert await table.published(campaign, page, AT)
    assert await table.event(campaign, page) is None
    assert not await table.published(campaign, page, AT)


async def test_a_campaign_expires_with_all_its_pages_that_were_not_begun(pool: Pool) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    table, campaign = await ready(pool, not_after=soon)
    assert not await table.expire(campaign)
    assert await claim(table, campaign, campaign.open[0])
    await pool.execute("UPDATE campaigns SET not_after = now()")
    assert not await claim(table, campaign, campaign.open[1])
    assert await table.expire(campaign)
    progress = await Campaigns(pool).progress(T, "c0")
    assert (progress.state, progress.expired, progress.publishing, progress.fixed) == ("expired", 36, 4, 0)
    assert progress.adds_up
    await Campaigns(pool).cancel(T, "c0")
    assert (await Campaigns(pool).progress(T, "c0")).state == "cancelled", "what is in BULK can still be withheld"


async def test_a_paused_campaign_expires_too(pool: Pool) -> None:
    table, _ = await ready(pool, not_after=datetime.now(UTC) + timedelta(hours=1))
    await Campaigns(pool).pause(T, "c0")
    assert await table.lease("me", (), 16) == []
    await pool.execute("UPDATE campaigns SET not_after = now()")
    assert await table.expire(await taken(table))
    assert await table.close(await taken(table))


async def test_a_campaign_that_is_over_names_nobody_any_more(pool: Pool) -> None:
    table, commands = CampaignTable(pool), Campaigns(pool)
    audience, exclude = Audience(users=("a", "b")), Audience(users=("b",))
    await commands.create(T, draft(audience, exclude=exclude))
    await commands.cancel(T, "c0")
    assert (await commands.read(T, "c0")).audience == audience
    assert await table.close(await taken(table))
    assert [
        one and one.users for one in ((await commands.read(T, "c0")).audience, (await commands.read(T, "c0")).exclude)
    ] == [(), ()]
    assert not await commands.create(T, draft(audience, exclude=exclude)), "it is still the same"


async def test_of_a_campaign_that_fails_no_page_is_begun_and_what_is_in_bulk_is_ended(pool: Pool) -> None:
    table, campaign = await ready(pool)
    commands, page = Campaigns(pool), campaign.open[0]
    assert await claim(table, campaign, page)
    assert not await table.fail(msgspec.structs.replace(campaign, revision=campaign.revision - 1), "why")
    assert await table.fail(campaign, "why")
    assert not await table.fail(await taken(table), "why else")
    assert not await claim(table, campaign, campaign.open[1])
    said = await commands.progress(T, "c0")
    assert (said.state, said.reason, said.publishing, said.fixed, said.expired) == ("failed", "why", 4, 0, 0)
    assert (said.failed, said.adds_up, said.finished_at) == (said.audience - 4, True, None)
    assert await table.published(campaign, page, AT)
    assert await table.done(campaign, msgspec.structs.replace(page, state=PageState.PUBLISHED), None)
    assert await table.close(await taken(table))
    said = await commands.progress(T, "c0")
    assert (said.state, said.dispatched, said.finished_at is not None) == ("failed", 4, True)


# --- commands ------------------------------------------------------------------------------------------------------------


async def test_asking_for_a_campaign_again_changes_nothing_and_another_under_its_id_is_refused(pool: Pool) -> None:
    commands, asked = Campaigns(pool), draft(Audience(users=("b", "a")), rate=10)
    assert await commands.create(T, asked)
    assert not await commands.create(T, asked)
    with pytest.raises(CampaignConflict, match="choose another"):
        await commands.create(T, draft(Audience(users=("b", "a")), rate=11))
    assert await commands.create("other", asked), "tenants do not see each other's"
    stored = await commands.read(T, "c0")
    assert (stored.audience.users, stored.rate, bytes(stored.message.data)) == (
        ("a", "b"),
        10,
        b'{"text":"hi","n":1.0}',
    )


async def test_progress_adds_up_in_every_state(pool: Pool) -> None:
    await join(pool, "news", *(f"u{n:03}" for n in range(40)))
    await Campaigns(pool).create(T, draft(Audience(topic="news"), exclude=Audience(users=("u001", "u002"))))
    table, commands = CampaignTable(pool), Campaigns(pool)
    campaign = await fixed(table)
    for page in campaign.open:
        assert await claim(table, campaign, page)
    first, second, third, _ = campaign.open
    assert await table.published(campaign, first, AT)
    assert await table.done(campaign, first, Withheld(1, 2))
    assert await table.published(campaign, second, AT)
    assert await table.ambiguous(campaign, msgspec.structs.replace(third, state=PageState.PUBLISHING), "why")
    running = await commands.progress(T, "c0")
    assert running.adds_up
    assert running.recipients_per_second > 0
    assert running.seconds_left is not None
    await commands.cancel(T, "c0")
    progress = await commands.progress(T, "c0")
    assert progress.adds_up
    parts = (progress.audience, progress.audience_final, progress.stored, progress.dispatched, progress.excluded)
    assert parts == (40, True, 5, 1, 2)
    assert (progress.publishing, progress.ambiguous, progress.cancelled, progress.fixed) == (4, 4, 23, 0)
    assert progress.expired == 2


async def test_what_does_not_move_for_a_minute_is_said_to_be_stuck(pool: Pool) -> None:
    table, campaign = await ready(pool)
    commands = Campaigns(pool)
    assert (await commands.progress(T, "c0")).stuck is None
    assert await claim(table, campaign, campaign.open[0])
    await pool.execute("UPDATE campaign_pages SET claimed_at = now() - interval '2 minutes' WHERE state = 'publishing'")
    assert "BULK" in ((await commands.progress(T, "c0")).stuck or "")
    assert await table.published(campaign, campaign.open[0], AT)
    await pool.execute(
        "UPDATE campaign_pages SET published_at = now() - interval '2 minutes' WHERE published_at < now()"
    )
    assert "dispatchers" in ((await commands.progress(T, "c0")).stuck or "")
    assert await table.done(campaign, campaign.open[0], None)
    ago = "now() - interval '2 minutes'"
    await pool.execute(f"UPDATE campaigns SET leased_until = {ago}, created_at = {ago}, start_at = {ago}")
    assert "pagers" in ((await commands.progress(T, "c0")).stuck or "")


async def test_a_campaign_that_is_over_is_not_changed_any_more(pool: Pool) -> None:
    commands = Campaigns(pool)
    await commands.create(T, draft(Audience(users=("a",))))
    await commands.cancel(T, "c0")
    await commands.cancel(T, "c0")
    for change in (commands.pause, commands.resume):
        with pytest.raises(CampaignConflict, match="is cancelled"):
            await change(T, "c0")
    with pytest.raises(NoCampaign):
        await commands.pause("other", "c0")


async def test_a_finished_campaign_is_removed_with_its_pages_after_its_time(pool: Pool) -> None:
    table, campaign = await ready(pool, 4)
    commands = Campaigns(pool)
    assert await table.claim(
        campaign, campaign.open[0], Cut("u003", 4, [], final=True), Cut("", 0, [], final=True), None, None
    )
    assert await table.close(await taken(table))
    assert (await commands.progress(T, "c0")).state == "done"
    assert await commands.remove_old() == 0
    await pool.execute("UPDATE campaigns SET finished_at = now() - interval '91 days'")
    assert await commands.remove_old() == 1
    assert await pool.fetchval("SELECT count(*) FROM campaign_pages") == 0


async def test_a_tenant_has_so_many_unfinished_campaigns_and_no_more(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.campaigns.commands.UNFINISHED_MAX", 2)
    commands = Campaigns(pool)
    for id in ("a", "b"):
        await commands.create(T, draft(Audience(users=("a",)), id))
    with pytest.raises(TooManyCampaigns, match="cancel some"):
        await commands.create(T, draft(Audience(users=("a",)), "c"))
    assert not await commands.create(T, draft(Audience(users=("a",)), "b"))
