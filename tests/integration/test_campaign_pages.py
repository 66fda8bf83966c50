"""Pagers on a real broker and a real database: what is appended to BULK, once, and when a page is done."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from engine.broker.jetstream import Broker
from engine.campaigns.bulk import Bulk
from engine.campaigns.commands import CampaignConflict, Campaigns
from engine.campaigns.cuts import Bounds, cut
from engine.campaigns.draft import Audience, Draft, Message, page_event
from engine.campaigns.pager import Pager
from engine.campaigns.planners import JobsPlanners
from engine.campaigns.table import CampaignTable
from engine.dispatch.source import BULK
from engine.errors import ApiError, OtherIncarnation, Unanswered
from engine.log.incarnations import read_partitions
from engine.log.marks import Mark, encode_mark
from engine.postgres import Pool
from engine.tasks import end
from engine.topology import server as topology
from ops.dev.servers import NatsServer
from seamark.protocol.events import accept
from tests.support.logs import FAST, connected, eventually

T = "acme"
MESSAGE = Message(type="sale.autumn", data=msgspec.Raw(b'{"text":"hi"}'))


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


@pytest.fixture
async def bulk(broker: Broker) -> Bulk:
    return Bulk(broker, await read_partitions(broker))


async def epoch(bulk: Bulk) -> str:
    return (await bulk.state()).epoch or ""


async def dispatch_all(broker: Broker) -> None:
    """Say, as dispatchers do, that all that is in BULK is dispatched."""
    state = await broker.stream(BULK.stream)
    for q in range(await read_partitions(broker)):
        log = await broker.stream(f"LOG-{q}")
        mark = Mark(state.epoch or "", state.last_seq, 1, "d", log.epoch or "")
        await broker.append(BULK.marked(q, q).subject, encode_mark(mark))


async def stored(broker: Broker) -> list[Any]:
    """The events of BULK, each one that a dispatcher accepts."""
    found, seq = [], 1
    while message := await broker.leader_next(BULK.stream, f"{BULK.prefix}.>", seq):
        found.append(accept(message.subject, message.payload))
        seq = message.seq + 1
    return found


async def test_a_page_is_appended_once_whoever_else_tries(broker: Broker, bulk: Bulk) -> None:
    event = page_event(T, "c0", MESSAGE, 0, ["alice"])
    assert await bulk.find(event.subject) is None
    at = await bulk.store(event.subject, event.payload, await epoch(bulk))
    assert await bulk.find(event.subject) == at.seq
    with pytest.raises(ApiError) as refused:
        await bulk.store(event.subject, event.payload, at.epoch)
    assert refused.value.err_code == 10071
    many = [bulk.store(page_event(T, "c0", MESSAGE, 1, ["bob"]).subject, b"{}", at.epoch) for _ in range(8)]
    outcomes = await asyncio.gather(*many, return_exceptions=True)
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 1
    assert (await bulk.state()).last_seq == 2


async def test_a_page_of_another_incarnation_of_bulk_is_not_appended(bulk: Bulk) -> None:
    event = page_event(T, "c0", MESSAGE, 0, ["alice"])
    with pytest.raises(OtherIncarnation):
        await bulk.store(event.subject, event.payload, "another1")
    assert (await bulk.state()).last_seq == 0


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Users of eleven, on pages of four."""
    monkeypatch.setattr("engine.campaigns.cuts.RECIPIENTS_MAX", 4)
    return tuple(f"user{n:02}" for n in range(11))


async def start(pool: Pool, users: tuple[str, ...], **more: Any) -> Campaigns:
    campaigns = Campaigns(pool)
    await campaigns.create(T, Draft(id="c0", audience=Audience(users=users), message=MESSAGE, **more))
    return campaigns


async def until(campaigns: Campaigns, reached: Any) -> None:
    async def check() -> bool:
        return bool(reached(await campaigns.progress(T, "c0")))

    await eventually(check)


async def test_everybody_is_on_one_page_and_the_campaign_ends_once_all_is_dispatched(
    broker: Broker, bulk: Bulk, pool: Pool, members: tuple[str, ...]
) -> None:
    campaigns = await start(pool, members, exclude=Audience(users=("user03",)))
    pager = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="pager")
    try:
        await until(campaigns, lambda said: said.stored == 10 and said.audience_final)
        assert (await campaigns.progress(T, "c0")).finished_at is None, "nothing is dispatched yet"
        await dispatch_all(broker)
        await until(campaigns, lambda said: said.finished_at is not None)
    finally:
        await end(pager)
    events = await stored(broker)
    assert [event.event.to for event in events] == [
        [user for user in members[:5] if user != "user03"],
        list(members[5:9]),
        list(members[9:]),
    ]
    assert [(event.event.id, event.event.transaction_id, event.at.type) for event in events] == [
        (f"c0:{n}", "campaign:c0", "sale.autumn") for n in range(3)
    ]
    said = await campaigns.progress(T, "c0")
    assert (said.state, said.audience, said.dispatched, said.excluded, said.adds_up) == ("done", 11, 10, 1, True)


async def stored_before(pool: Pool, **said: Any) -> None:
    """Make the campaign one that an earlier version has stored."""
    message = {"type": "sale.autumn", "data": {"text": "hi"}, **said}
    await pool.execute("UPDATE campaigns SET message = $1", msgspec.json.encode(message).decode())


async def test_a_campaign_that_an_earlier_version_accepted_goes_out_as_it_would_have(
    broker: Broker, bulk: Bulk, pool: Pool, members: tuple[str, ...]
) -> None:
    campaigns = await start(pool, members[:2])
    await stored_before(pool, channels=["inapp", "slack"], category="a\0b", collapse_key="a\0b")
    pager = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="pager")
    try:
        await until(campaigns, lambda said: said.stored == 2)
        await dispatch_all(broker)
        await until(campaigns, lambda said: said.finished_at is not None)
    finally:
        await end(pager)
    [event] = await stored(broker)
    assert (event.event.channels, event.event.category) == (["inapp"], "a\ufffdb")
    assert (await campaigns.progress(T, "c0")).state == "done"


@pytest.mark.parametrize("page_is_there", [False, True], ids=["no page yet", "a page waits"])
async def test_a_campaign_whose_event_can_never_be_published_ends_as_failed_with_the_reason(
    broker: Broker, bulk: Bulk, pool: Pool, members: tuple[str, ...], page_is_there: bool
) -> None:
    campaigns, table = await start(pool, members), CampaignTable(pool)
    if page_is_there:
        [campaign] = await table.lease("me", (), 16)
        window = await table.window(campaign, "", None)
        assert await table.fix(campaign, cut(window, Bounds(4, 1 << 20)))
        await pool.execute("UPDATE campaigns SET leased_until = '-infinity'")
    await stored_before(pool, channels=["slack"])
    with capture_logs() as logs:
        pager = asyncio.create_task(Pager(table, bulk).run(), name="pager")
        try:
            await until(campaigns, lambda said: said.finished_at is not None)
        finally:
            await end(pager)
    said = await campaigns.progress(T, "c0")
    assert (said.state, said.failed, said.expired, said.stored, said.adds_up) == ("failed", said.audience, 0, 0, True)
    assert "'slack'" in (said.reason or "")
    assert [one.state for one in await campaigns.list(T, 10)] == ["failed"]
    assert [one["event"] for one in logs] == ["campaign_failed"]
    assert await stored(broker) == []
    with pytest.raises(CampaignConflict, match="failed"):
        await campaigns.resume(T, "c0")


async def test_a_user_whom_no_event_may_name_gets_nothing_of_a_campaign_and_stops_nobody_elses(
    broker: Broker, bulk: Bulk, pool: Pool, members: tuple[str, ...]
) -> None:
    campaigns = await start(pool, members[:2])
    await pool.execute("UPDATE campaigns SET users = array_append(users, 'segment:x')")  # an earlier version let him be
    pager = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="pager")
    try:
        await until(campaigns, lambda said: said.stored == 2)
    finally:
        await end(pager)
    [event] = await stored(broker)
    assert sorted(event.event.to) == list(members[:2])
    said = await campaigns.progress(T, "c0")
    assert (said.audience, said.excluded, said.failed, said.adds_up) == (3, 1, 0, True)


async def test_a_campaign_waits_while_bulk_takes_nothing(
    bulk: Bulk, pool: Pool, members: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    campaigns, asked = await start(pool, members[:2]), 0

    async def away() -> Any:
        nonlocal asked
        asked += 1
        raise Unanswered("away")

    with monkeypatch.context() as outage:
        outage.setattr(bulk, "state", away)
        pager = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="pager")
        await eventually(lambda: asked >= 2)
    try:
        await until(campaigns, lambda said: said.stored == 2)
    finally:
        await end(pager)


async def test_a_rate_that_is_raised_finds_whole_pages_and_not_those_of_the_slow_one(bulk: Bulk, pool: Pool) -> None:
    campaigns = await start(pool, tuple(f"user{n:04}" for n in range(1000)), rate=1)
    pager = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="pager")
    try:
        await until(campaigns, lambda said: said.stored >= 5 and said.audience_final)
        await campaigns.set_rate(T, "c0", None)
        await until(campaigns, lambda said: said.stored == 1000)
    finally:
        await end(pager)
    assert (await campaigns.progress(T, "c0")).pages < 20


async def test_a_page_is_not_done_before_every_planner_has_passed_it(
    broker: Broker, bulk: Bulk, pool: Pool, members: tuple[str, ...]
) -> None:
    campaigns, partitions = await start(pool, members[:2]), await read_partitions(broker)
    planners = JobsPlanners(broker)
    assert await planners.has_room()
    pager = asyncio.create_task(Pager(CampaignTable(pool), bulk, planners=planners).run(), name="pager")
    try:
        await until(campaigns, lambda said: said.stored == 2)
        await broker.append("log.0.acme.user00", b"{}")
        await dispatch_all(broker)
        await eventually(lambda: pool.fetchval("SELECT heads FROM campaign_pages WHERE heads IS NOT NULL"))
        assert (await campaigns.progress(T, "c0")).dispatched == 0
        jobs = await broker.stream("JOBS")
        for p in range(partitions):
            log = await broker.stream(f"LOG-{p}")
            await broker.append(
                f"jmark.{p}", encode_mark(Mark(log.epoch or "", log.last_seq, 9, "p", jobs.epoch or ""))
            )
        await until(campaigns, lambda said: said.finished_at is not None)
    finally:
        await end(pager)


async def dies_in_doubt(
    campaigns: Campaigns, pool: Pool, bulk: Bulk, monkeypatch: pytest.MonkeyPatch, *, was_stored: bool
) -> None:
    """A pager appends a page, gets no answer, and dies before it tries again."""
    tried, store = asyncio.Event(), Bulk.store

    async def unanswered(self: Bulk, *page: Any) -> Any:
        if was_stored:
            await store(self, *page)
        tried.set()
        raise Unanswered("who knows")

    with monkeypatch.context() as patch:
        patch.setattr(Bulk, "store", unanswered)
        patch.setattr("engine.campaigns.pager.RETRY_SECONDS", 3600.0)
        pager = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="dying")
        try:
            await asyncio.wait_for(tried.wait(), 60)
            await until(campaigns, lambda said: said.publishing == 4)
        finally:
            await end(pager)


@pytest.mark.parametrize("was_stored", [True, False])
@pytest.mark.parametrize("change", [None, "pause"])
async def test_what_a_dead_pager_left_in_doubt_is_settled_by_reading_bulk_paused_or_not(
    was_stored: bool,
    change: str | None,
    broker: Broker,
    bulk: Bulk,
    pool: Pool,
    members: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    campaigns = await start(pool, members[:4])
    await dies_in_doubt(campaigns, pool, bulk, monkeypatch, was_stored=was_stored)
    if change:
        await campaigns.pause(T, "c0")
    await pool.execute("UPDATE campaigns SET leased_until = now() - interval '1 second'")
    second = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="second")
    try:
        await until(campaigns, lambda said: said.stored == 4)
    finally:
        await end(second)
    assert [event.event.to for event in await stored(broker)] == [list(members[:4])]


async def test_a_page_in_doubt_whose_time_bulk_has_forgotten_is_ambiguous_and_never_appended_again(
    broker: Broker, bulk: Bulk, pool: Pool, members: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    campaigns = await start(pool, members[:4])
    await dies_in_doubt(campaigns, pool, bulk, monkeypatch, was_stored=True)
    await broker.api(f"STREAM.PURGE.{BULK.stream}", {})
    await pool.execute("UPDATE campaigns SET leased_until = now() - interval '1 second'")
    second = asyncio.create_task(Pager(CampaignTable(pool), bulk).run(), name="second")
    try:
        await until(campaigns, lambda said: said.ambiguous == 4 and said.finished_at is not None)
    finally:
        await end(second)
    assert await stored(broker) == []
    assert "does not reach back" in await pool.fetchval("SELECT reason FROM campaign_pages")
