"""A planner with the rules and users of a test, in the test's own loop or, as a module that is run, as the role's process."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import asyncpg

from engine.broker.jetstream import Broker
from engine.errors import StoreUnavailable
from engine.log.incarnations import read_partitions
from engine.plan.patterns import patterns_of
from engine.plan.preferences import TenantDefaults
from engine.plan.profile import Profile
from engine.plan.rules import CHANNELS, Channel, ChannelRule, TypeRule
from engine.planner.planner import Planner
from engine.planner.plans import User
from engine.settings import Settings, load_settings
from engine.tasks import run_until
from ops.process import Health, run_role, stores
from tests.support.logs import PIN_TIMEOUT_SECONDS, at_work, connected
from tests.support.roles import RoleProcess

MAIL = TypeRule(pattern="order.*", channels={"email": ChannelRule(), "push": ChannelRule()})

REACHED = Profile(version=1, reach=("email", "push"))


class FixedRules:
    """The rules of all tenants."""

    def __init__(self, rules: Iterable[TypeRule] = (MAIL,)) -> None:
        self.rules = list(rules)
        self.defaults = TenantDefaults()
        self.away = False
        self.held: FixedRules | None = None

    async def of(self, tenant: str) -> "FixedRules":
        """What they are now: another object once they have changed, and only then, as a process holds them."""
        if self.away:
            raise StoreUnavailable("away")
        if self.held is None or self.held.rules != self.rules:
            self.held = FixedRules(self.rules)
        return self.held

    def rule_of(self, type: str) -> TypeRule | None:
        by_pattern = {rule.pattern: rule for rule in self.rules}
        return next((by_pattern[pattern] for pattern in patterns_of(type) if pattern in by_pattern), None)

    def templates_of(self, type: str) -> tuple[Channel, ...]:
        return CHANNELS

    def webhook_of(self, type: str) -> bool:
        return False


class FixedProfiles:
    """Every user has this profile."""

    def __init__(self, profile: Profile = REACHED) -> None:
        self.profile = profile
        self.away = False

    async def of_all(self, users: Sequence[User]) -> list[Profile]:
        if self.away:
            raise StoreUnavailable("away")
        await asyncio.sleep(0)
        return [self.profile for _ in users]


def planner_of(
    broker: Broker,
    pool: asyncpg.Pool,
    rules: FixedRules,
    profiles: FixedProfiles,
    partitions: int,
    pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS,
) -> Planner:
    return Planner(
        broker, pool, rules, profiles, lambda tenant, user: (), partitions, pin_timeout_seconds=pin_timeout_seconds
    )


@contextlib.asynccontextmanager
async def planning(
    url: str,
    pool: asyncpg.Pool,
    rules: FixedRules | None = None,
    profiles: FixedProfiles | None = None,
    *,
    pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS,
) -> AsyncIterator[Planner]:
    """A planner at work on a connection of its own; a fault of it fails the test."""
    async with connected(url) as broker:
        partitions = await read_partitions(broker)
        work = planner_of(
            broker, pool, rules or FixedRules(), profiles or FixedProfiles(), partitions, pin_timeout_seconds
        )
        async with at_work(work.run(), "planner"):
            yield work


class PlannerProcess(RoleProcess):
    """One planner process."""

    def __init__(self, name: str, folder: Path, nats_url: str, redis_url: str, postgres_url: str) -> None:
        super().__init__(name, folder, nats_url)
        self.urls = {"SEAMARK_REDIS_URL": redis_url, "SEAMARK_POSTGRES_URL": postgres_url}

    def command(self) -> list[str]:
        return ["tests.support.planning"]

    def settings(self) -> dict[str, str]:
        return self.urls


async def _plan(settings: Settings, stop: asyncio.Event, health: Health) -> None:
    assert settings.postgres_url is not None
    pool = asyncpg.create_pool(settings.postgres_url.reveal(), min_size=0, max_size=4, timeout=5)
    await pool
    try:
        async with stores("planner", settings, health) as (broker, _):
            work = planner_of(broker, pool, FixedRules(), FixedProfiles(), await read_partitions(broker))
            await run_until(stop, work.run(), name="planner")
    finally:
        pool.terminate()


def record(id: str, user: str = "alice", type: str = "order.shipped", **other: Any) -> bytes:
    """A record as a dispatcher writes it."""
    plan = {"inapp": {"when": "now", "why": "default"}}
    body = {"id": id, "kind": "notification", "tenant": "default", "user": user, "type": type, "plan": plan, **other}
    return json.dumps(body | {"at": "2026-01-31T12:00:00Z"}).encode()


if __name__ == "__main__":
    settings_ = load_settings(os.environ)
    sys.exit(run_role("planner", settings_, lambda stop, health: _plan(settings_, stop, health)))
