"""Campaigns on real servers and roles, which are killed while they send them: everybody gets one record, and the numbers add up.

As part of all tests with a few thousand users; `SEAMARK_CHAOS_SECONDS=120` makes them 200 000, the size that the promise names.
"""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.campaigns.commands import Campaigns
from engine.campaigns.draft import Audience, Draft, Message, transaction_id
from engine.campaigns.progress import Progress
from engine.cancels import cancel
from engine.postgres import Pool
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections.deliveries.campaigns import CampaignChannels
from seamark.protocol.subjects import log_stream
from tests.support.chaos import SECONDS, Chaos
from tests.support.logs import FAST, connected, eventually
from tests.support.paging import PagerProcess
from tests.support.planning import PlannerProcess
from tests.support.projections import ProjectorProcess
from tests.support.roles import DispatcherProcess, RoleProcess

T = "default"
TOPIC = "news"
PARTITIONS = 4
KILLS = 10
USERS = 3_000 + round(SECONDS * 1_642)
PAGES = 20
PAGE_USERS = min(10_000, USERS // PAGES)
MESSAGE = Message(type="order.shipped", data=msgspec.Raw(b'{"text":"hi"}'))
LOOK_SECONDS = 0.1

pytestmark = [pytest.mark.chaos(takes_seconds=30.0), pytest.mark.timeout(300 + 5 * SECONDS)]


class PostgresProjector(ProjectorProcess):
    """A projector that keeps the inbox, too."""

    def __init__(self, name: str, folder: Path, nats_url: str, redis_url: str, postgres_url: str) -> None:
        super().__init__(name, folder, nats_url, redis_url)
        self._postgres_url = postgres_url

    def settings(self) -> dict[str, str]:
        return super().settings() | {"SEAMARK_POSTGRES_URL": self._postgres_url}


@dataclass
class Sender:
    """What sends campaigns, and who their audience is."""

    broker: Broker
    pool: Pool
    campaigns: Campaigns
    roles: dict[str, RoleProcess]
    looks: int = 0
    moved: set[str] = field(default_factory=set)
    """Users who joined or left while a campaign went out."""

    async def join(self, users: list[str]) -> None:
        columns = ["tenant", "topic", "user_id"]
        await self.pool.copy_records_to_table("topic_members", records=[(T, TOPIC, u) for u in users], columns=columns)

    async def come_and_go(self, rng: random.Random, users: list[str]) -> None:
        """Somebody joins or leaves, again and again."""
        leaving = rng.sample(users, len(users) // 10)
        for number in range(10**6):
            joins = not leaving or number % 2 == 0
            user = f"user{rng.randrange(USERS):06}n{number}" if joins else leaving.pop()
            self.moved.add(user)
            if joins:
                await self.join([user])
            else:
                await self.pool.execute("DELETE FROM topic_members WHERE user_id = $1", user)
            await asyncio.sleep(0.02)

    async def watched(self, id: str) -> Progress:
        """Look at the progress ten times a second until the campaign is over. Whenever it is looked at, it adds up."""
        while True:
            said = await self.campaigns.progress(T, id)
            assert said.adds_up, said
            self.looks += 1
            if said.finished_at is not None:
                return said
            await asyncio.sleep(LOOK_SECONDS)

    async def shown(self, id: str) -> list[tuple[str, datetime]]:
        """Whom a campaign was shown to, by the logs, and when each record was stored; no user has two records of it."""
        found, users = [], Counter[str]()
        for partition in range(PARTITIONS):
            for stored in await whole_stream(self.broker, log_stream(partition), f"log.{partition}.{T}.>"):
                record = json.loads(stored.payload)
                if record["id"].startswith(f"{id}:"):
                    users[record["user"]] += 1
                    if any(one["when"] != "never" for one in record["plan"].values()):
                        found.append((record["user"], datetime.fromisoformat(stored.time)))
        assert [user for user, count in users.items() if count > 1] == [], "these have more than one record"
        return found


@contextlib.asynccontextmanager
async def _sender(
    nats: NatsServer, valkey: Valkey, postgres: str, pool: Pool, folder: Path, names: list[str]
) -> AsyncIterator[Sender]:
    async with connected(nats.url) as broker:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
        sender = Sender(broker, pool, Campaigns(pool), dict(_roles(nats.url, valkey.url, postgres, folder, names)))
        try:
            for role in sender.roles.values():
                role.spawn()
            await eventually(lambda: all(role.ready for role in sender.roles.values()), seconds=90)
            yield sender
        finally:
            for role in sender.roles.values():
                role.kill()


def _roles(nats: str, redis: str, postgres: str, folder: Path, names: list[str]) -> Iterator[tuple[str, RoleProcess]]:
    for name in names:
        match name.split("-")[0]:
            case "pager":
                yield name, PagerProcess(name, folder, nats, redis, postgres, PAGE_USERS)
            case "dispatcher":
                yield name, DispatcherProcess(name, folder, nats, redis)
            case "planner":
                yield name, PlannerProcess(name, folder, nats, redis, postgres)
            case "projector":
                yield name, PostgresProjector(name, folder, nats, redis, postgres)


async def test_everybody_gets_a_campaign_once_although_all_that_send_it_are_killed_again_and_again(
    nats_server: NatsServer, valkey: Valkey, postgres: str, pool: Pool, tmp_path: Path, chaos: Chaos
) -> None:
    rng, users = chaos.rng, [f"user{number:06}" for number in range(USERS)]
    excluded = rng.sample(users, USERS // 20)
    names = ["pager-0", "pager-1", "dispatcher-0", "dispatcher-1", "planner-0", "planner-1"]
    async with _sender(nats_server, valkey, postgres, pool, tmp_path, names) as sender:
        await sender.join(users)
        audience = Audience(topic=TOPIC)
        # So that it takes a while: small ones would be over before the second is killed.
        asked = Draft(
            id="c0", audience=audience, message=MESSAGE, exclude=Audience(users=tuple(excluded)), rate=USERS // 6
        )
        await sender.campaigns.create(T, asked)
        watching = asyncio.create_task(sender.watched("c0"), name="watch")
        moving = asyncio.create_task(sender.come_and_go(rng, users), name="come and go")
        for _ in range(KILLS):
            await asyncio.sleep(rng.uniform(0.1, 0.6) * (1 + SECONDS / 60))
            victim = rng.choice(list(sender.roles.values()))
            victim.kill()
            victim.spawn()
        said = await watching
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        got = {user for user, _ in await sender.shown("c0")}
    assert got.isdisjoint(excluded)
    always = set(users) - set(excluded) - sender.moved
    assert always <= got, f"seed {chaos.seed}: {len(always - got)} were left out"
    assert got <= set(users) | sender.moved
    assert (said.state, said.stored, said.dispatched) == ("done", len(got), len(got))
    assert sender.looks > 3


async def test_of_a_cancelled_campaign_nothing_is_shown_that_was_not_dispatched_and_its_numbers_say_so(
    nats_server: NatsServer, valkey: Valkey, postgres: str, pool: Pool, tmp_path: Path
) -> None:
    users = [f"user{number:06}" for number in range(USERS)]
    names = ["pager-0", "dispatcher-0", "planner-0", "projector-0"]
    async with _sender(nats_server, valkey, postgres, pool, tmp_path, names) as sender:
        await sender.join(users)
        # Half a minute: however late it is cancelled, most of it is still to come.
        asked = Draft(id="c0", audience=Audience(topic=TOPIC), message=MESSAGE, rate=USERS // 30)
        await sender.campaigns.create(T, asked)

        async def reached(dispatched: int, waiting: int) -> bool:
            said = await sender.campaigns.progress(T, "c0")
            return said.dispatched >= dispatched and said.stored - said.dispatched >= waiting

        await eventually(lambda: reached(1, 0), seconds=60)
        dispatcher = sender.roles["dispatcher-0"]
        dispatcher.stop()
        await eventually(lambda: reached(1, PAGE_USERS), seconds=60)
        before = len(await sender.shown("c0"))
        await cancel_as_the_api_does(sender, "c0")
        dispatcher.start()
        said = await asyncio.wait_for(sender.watched("c0"), 60 + SECONDS)
        shown = len(await sender.shown("c0"))

        async def counted() -> bool:
            found = await CampaignChannels(pool).of(T, "c0")
            return found["inapp"].total == await records(sender) and found["email"].total == shown

        await eventually(counted, seconds=60 + SECONDS)
        channels = await CampaignChannels(pool).of(T, "c0")
    assert channels["inapp"].states == {"stored": shown, "cancelled": channels["inapp"].total - shown}
    assert channels["email"].states == channels["push"].states == {"planned": shown}, "withheld records are not planned"
    assert shown == before < USERS, "what is dispatched after it was cancelled is withheld"
    assert (said.state, said.stored, said.dispatched, said.cancelled) == (
        "cancelled",
        shown,
        shown,
        said.audience - shown,
    )


async def records(sender: Sender) -> int:
    """How many records there are, be they shown or not."""
    return sum([len(await whole_stream(sender.broker, log_stream(p), f"log.{p}.>")) for p in range(PARTITIONS)])


async def cancel_as_the_api_does(sender: Sender, id: str) -> None:
    """First in the table, so that no page is begun any more, then for the dispatchers."""
    await sender.campaigns.cancel(T, id)
    await cancel(sender.broker, T, transaction_id(id), budget_seconds=10)


if SECONDS:  # it measures time: on a machine with nothing else to do

    async def test_a_second_after_a_campaign_is_cancelled_at_half_nothing_more_of_it_is_stored(
        nats_server: NatsServer, valkey: Valkey, postgres: str, pool: Pool, tmp_path: Path
    ) -> None:
        users = [f"user{number:06}" for number in range(USERS)]
        names = ["pager-0", "dispatcher-0", "planner-0", "projector-0"]
        async with _sender(nats_server, valkey, postgres, pool, tmp_path, names) as sender:
            await sender.join(users)
            await sender.campaigns.create(T, Draft(id="c0", audience=Audience(topic=TOPIC), message=MESSAGE))

            async def at_half() -> bool:
                return (await sender.campaigns.progress(T, "c0")).stored >= USERS // 2

            await eventually(at_half, seconds=60 + SECONDS)
            await cancel_as_the_api_does(sender, "c0")
            answered = time.time()
            said = await sender.watched("c0")
            late = max(at.timestamp() - answered for _, at in await sender.shown("c0"))
            shown = len(await sender.shown("c0"))
        print(f"the last record that is shown was stored {late:.3f} s after the answer; {shown} of {USERS} are shown")
        assert late <= 1.0
        assert (said.stored, said.cancelled) == (shown, said.audience - shown)
