"""A user switches a channel off and on while events for him arrive, and whatever is behind that is killed, at bad moments too."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import aiohttp
import asyncpg
import pytest

from chaos.load import whole_stream
from engine.broker.jetstream import Broker, Outgoing
from engine.errors import BrokerError
from engine.log.writer import read_mark
from engine.planner import position
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Postgres, Valkey
from ops.migrate import migrate
from seamark.protocol.receipts import decode_receipt
from seamark.protocol.subjects import log_subject
from tests.support.chaos import SECONDS
from tests.support.logs import FAST, connected, eventually
from tests.support.planning import record
from tests.support.roles import GatewayRole, RoleProcess
from tests.support.servers import end
from tests.support.tokens import bearer

pytestmark = [pytest.mark.chaos(takes_seconds=25), pytest.mark.timeout(300 + 5 * SECONDS)]

RATE = 2000 if SECONDS else 300
"""Records a second for the one user: in the longer form as many as a busy system has for all of them."""

HOLDS_SECONDS = 1.0
"""Since when an answered change holds, at the latest."""

PAUSE_SECONDS = 0.15
"""Between two changes: a user may make 600 requests in a minute."""

MENDED_SECONDS = 60.0


class Change(NamedTuple):
    """What the user asked for, when, and when it was answered; None: it was not, and may have been done or not."""

    choice: str
    asked_at: float
    answered_at: float | None


@dataclass
class User:
    """Alice, who cannot make up her mind."""

    url: str
    http: aiohttp.ClientSession
    changes: list[Change] = field(default_factory=lambda: [Change("on", 0.0, 0.0)])
    stopped: bool = False

    async def run(self) -> None:
        """Change the choice until `stopped`; the last change is answered."""
        while not self.stopped or self.changes[-1].answered_at is None:
            await self._change("off" if self.changes[-1].choice == "on" else "on")
            await asyncio.sleep(PAUSE_SECONDS)

    async def _change(self, choice: str) -> None:
        asked_at, answered_at = time.time(), None
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self.http.patch(
                f"{self.url}/v1/preferences", json={"channels": {"email": choice}}, headers=bearer()
            ) as answer:
                assert answer.status in (200, 503), await answer.text()
                answered_at = time.time() if answer.status == 200 else None
        self.changes.append(Change(choice, asked_at, answered_at))

    @property
    def answered(self) -> int:
        return sum(change.answered_at is not None for change in self.changes)

    async def is_answered_again(self) -> None:
        """Return when some changes more were answered."""
        enough = self.answered + 3
        await eventually(lambda: self.answered >= enough, seconds=MENDED_SECONDS)

    def possible(self, at: float, written_at: float) -> set[str]:
        """What a plan that was begun and written down then may say: the last choice that held for certain, and what was
        asked for since then."""
        found: set[str] = set()
        for change in self.changes:
            if change.asked_at <= written_at:
                certain = change.answered_at is not None and change.answered_at + HOLDS_SECONDS <= at
                found = {change.choice} if certain else found | {change.choice}
        return found


class Arriving:
    """Records for alice, at `RATE`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.count = self.end = 0
        self.stopped = False

    async def run(self) -> None:
        """Write until `stopped`. A batch that was not answered is written again, and may then be there twice."""
        batch, answered = RATE // 20, True
        while not (self.stopped and answered):
            began, answered = time.monotonic(), False
            ids = range(self.count, self.count + batch)
            with contextlib.suppress(BrokerError):
                records = [Outgoing(log_subject(0, "default", "alice"), record(f"e{n}")) for n in ids]
                self.end = (await self._broker.commit(records)).seq
                self.count += batch
                answered = True
            await asyncio.sleep(max(0.0, began + 0.05 - time.monotonic()))

    async def planned(self) -> bool:
        """Whether all of them are."""
        mark = (await read_mark(self._broker, position.marked(0))).mark
        return mark is not None and mark.seq >= self.end


class Planning(RoleProcess):
    """`seamark planner`."""

    def command(self) -> list[str]:
        return ["ops", "planner"]

    def settings(self) -> dict[str, str]:
        return self.stores

    stores: dict[str, str]


class Api(GatewayRole):
    """`seamark gateway` with its stores."""

    def settings(self) -> dict[str, str]:
        return super().settings() | self.stores

    stores: dict[str, str]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Postgres]:
    """A PostgreSQL of the test's own, with the schema and the rule of one type."""
    server = Postgres(tmp_path / "postgres")
    try:
        server.start()
        await migrate(server.url)
        connection = await asyncpg.connect(server.url)
        rule = '{"pattern":"order.*","channels":{"email":{}}}'
        await connection.execute("INSERT INTO notification_types VALUES ('default', 'order.*', $1, 1)", rule)
        await connection.execute("INSERT INTO rule_versions VALUES ('default', 1)")
        await connection.close()
        yield server
    finally:
        end(server)


async def test_a_channel_that_is_switched_off_is_off_for_whatever_is_planned_a_second_later_whoever_dies(
    nats_server: NatsServer, valkey: Valkey, database: Postgres, tmp_path: Path
) -> None:
    stores = {"SEAMARK_REDIS_URL": valkey.url, "SEAMARK_POSTGRES_URL": database.url}
    planner, api = Planning("planner", tmp_path, nats_server.url), Api("api", tmp_path, nats_server.url)
    planner.stores = api.stores = stores

    async def kill_api(point: str) -> None:
        api.kill()
        await asyncio.to_thread(api.spawn, fail_point=point)
        await eventually(lambda: api.exit_code == -9, seconds=MENDED_SECONDS)
        await asyncio.to_thread(api.start)

    async def restart(server: Valkey | Postgres | RoleProcess) -> None:
        server.kill()
        await asyncio.sleep(1)  # the length of the outage
        await asyncio.to_thread(server.start)

    deaths: list[Callable[[], Awaitable[None]]] = [
        lambda: kill_api("after-marks-before-change"),
        lambda: kill_api("after-change-before-settled:3"),
        lambda: restart(valkey),
        lambda: restart(database),
        lambda: restart(planner),
    ]
    try:
        async with connected(nats_server.url) as broker, aiohttp.ClientSession() as http:
            await topology.ensure(broker, "dev", 1, overrides=FAST)
            await asyncio.gather(*(asyncio.to_thread(role.start) for role in (planner, api)))
            user, arriving = User(api.url, http), Arriving(broker)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(arriving.run(), name="arriving")
                changing = tasks.create_task(user.run(), name="user")
                until = time.monotonic() + SECONDS
                for die in itertools.cycle(deaths):
                    await die()
                    await user.is_answered_again()
                    if die is deaths[-1] and time.monotonic() >= until:
                        break
                user.stopped = True
                await asyncio.wait_for(changing, MENDED_SECONDS)
                last, arrived = user.changes[-1], arriving.count
                assert last.answered_at is not None
                await asyncio.sleep(max(0.0, last.answered_at + HOLDS_SECONDS - time.time()))
                await eventually(lambda: arriving.count > arrived + RATE)
                arriving.stopped = True
            await eventually(arriving.planned, seconds=MENDED_SECONDS + 5 * SECONDS)
            await _judge(broker, user, arriving.count)
    finally:
        planner.kill()
        api.kill()


async def _judge(broker: Broker, user: User, count: int) -> None:
    found = await whole_stream(broker, "RECEIPTS", "rcpt.0.>")
    plans = [(decode_receipt(one.payload), datetime.fromisoformat(one.time).timestamp()) for one in found]
    assert {one.id for one, _ in plans} == {f"e{n}" for n in range(count)}
    said = {}
    for one, written_at in plans:
        assert one.plan is not None
        choice = "off" if one.plan["email"].why == "user_off" else "on"
        possible = user.possible(one.at.timestamp(), written_at)
        assert choice in possible, f"{one.id} at {one.at}, written at {written_at}: {user.changes}"
        said[one.id] = choice
    assert said[f"e{count - 1}"] == user.changes[-1].choice
    assert set(said.values()) == {"on", "off"}
    print(f"{count} records, {len(plans)} plans, {user.answered} of {len(user.changes)} changes answered")
