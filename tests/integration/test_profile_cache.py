"""The cache of profiles against a real Valkey, while writers, readers and Redis itself are stopped at any step.

PostgreSQL is a number here, which changes at once: what is held is the order of steps. The scripts are the real ones. A mark or a
lease that has run out is written as such into Valkey, so no test waits for a minute.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from engine.errors import StoreUnavailable
from engine.plan.profile import Profile
from engine.profiles import cache
from engine.profiles.cache import ProfileCache
from ops.dev.servers import Valkey

SCRIPTS = {"look": cache._LOOK, "fill": cache._FILL, "mark": cache._MARK, "settle": cache._SETTLE}
MINUTE_MS = 60_000
KEY = cache._key("t", "alice")


class World(RuleBasedStateMachine):
    """Writers (mark, commit, settle) and readers (look, read, fill) of one user, each at its own pace, or stopped for good."""

    redis: BlockingRedis
    scripts: Mapping[str, str] = SCRIPTS
    guarded = True
    """A writer whose mark may have run out does not commit (`Directory.changing`)."""

    numbers = itertools.count()

    @initialize()
    def begin(self) -> None:
        self.redis.delete(KEY)
        self.version = 0
        self.marked: dict[str, int] = {}  # writers before their commit
        self.committed: list[str] = []  # writers after it
        self.looked: dict[str, bool] = {}  # readers who shall read; whether they may fill
        self.read: dict[str, int] = {}  # what readers with a lease have read

    def run(self, name: str, *args: str | int) -> Any:
        return self.redis.eval(self.scripts[name], 1, KEY, *args)

    @rule()
    def mark(self) -> None:
        token = f"w{next(self.numbers)}"
        self.run("mark", token, MINUTE_MS)
        self.marked[token] = 1

    @precondition(lambda self: self.marked)
    @rule(data=st.data(), rolled_back=st.booleans())
    def end_transaction(self, data: st.DataObject, rolled_back: bool) -> None:
        token = data.draw(st.sampled_from(sorted(self.marked)))
        del self.marked[token]
        if not rolled_back:
            self.version += 1
        self.committed.append(token)

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), dies=st.booleans())
    def settle(self, data: st.DataObject, dies: bool) -> None:
        token = data.draw(st.sampled_from(sorted(self.committed)))
        self.committed.remove(token)
        if dies:
            self.let_a_mark_run_out(token)
        else:
            self.run("settle", token)

    def let_a_mark_run_out(self, token: str) -> None:
        if self.redis.hexists(KEY, f"mark:{token}"):
            self.redis.hset(KEY, f"mark:{token}", 0)

    @precondition(lambda self: self.marked)
    @rule(data=st.data())
    def stop_before_the_commit_for_a_minute(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.marked)))
        self.let_a_mark_run_out(token)
        if self.guarded:
            del self.marked[token]

    @rule()
    def look(self) -> None:
        token = f"r{next(self.numbers)}"
        found = self.run("look", token, MINUTE_MS)
        if isinstance(found, list):
            assert msgspec.json.decode(found[0]) == self.version, "an old profile was read"
        else:
            self.looked[token] = found == b"yours"

    @precondition(lambda self: self.looked)
    @rule(data=st.data())
    def read_the_primary(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.looked)))
        if self.looked.pop(token):
            self.read[token] = self.version

    @precondition(lambda self: self.read)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.read)))
        self.run("fill", token, msgspec.json.encode(self.read.pop(token)), MINUTE_MS)

    @rule()
    def let_a_lease_run_out(self) -> None:
        if self.redis.hexists(KEY, "lease"):
            self.redis.hset(KEY, "lease_until", 0)

    @precondition(lambda self: not self.marked)
    @rule()
    def lose_all_in_redis(self) -> None:
        self.redis.delete(KEY)

    @invariant()
    def what_is_kept_is_what_is_true(self) -> None:
        body = self.redis.hget(KEY, "body")
        assert body is None or msgspec.json.decode(body) == self.version

    @invariant()
    def everything_ends_by_itself(self) -> None:
        if self.redis.exists(KEY):
            assert 0 < self.redis.pttl(KEY) <= MINUTE_MS


def explore(valkey: Valkey, examples: int, **of: Any) -> None:
    world = type("AWorld", (World,), of)
    with BlockingRedis.from_url(valkey.url) as redis:
        world.redis = redis
        run_state_machine_as_test(
            world,
            settings=settings(
                max_examples=examples,
                stateful_step_count=25,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
                print_blob=False,
            ),
        )


def test_no_order_of_steps_and_deaths_leaves_an_old_profile(valkey: Valkey) -> None:
    explore(valkey, 150)


MUTANTS: dict[str, dict[str, Any]] = {
    "an end takes off the marks of others": {
        "scripts": {**SCRIPTS, "settle": "redis.call('DEL', KEYS[1])"},
    },
    "a fill asks for no lease": {
        "scripts": {**SCRIPTS, "fill": SCRIPTS["fill"].replace("~= ARGV[1] then return 0", "== 'x' then return 0")},
    },
    "a mark leaves leases": {
        "scripts": {**SCRIPTS, "mark": SCRIPTS["mark"].replace("'body', 'lease', 'lease_until'", "'body'")},
    },
    "a mark leaves what is kept": {
        "scripts": {**SCRIPTS, "mark": SCRIPTS["mark"].replace("'body', 'lease', 'lease_until'", "'lease'")},
    },
    "a lease is given under a mark": {
        "scripts": {**SCRIPTS, "look": SCRIPTS["look"].replace("if marked then return 'marked' end", "")},
    },
    "a writer commits after its mark has run out": {"guarded": False},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_rule_that_is_left_out_is_noticed(valkey: Valkey, name: str) -> None:
    mutant = MUTANTS[name]
    assert mutant.get("scripts") != SCRIPTS, "the text was found"
    with pytest.raises(AssertionError):
        explore(valkey, 400, **mutant)


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey.url) as client:
        yield client


class Primary:
    """What PostgreSQL would say, and how often it was asked."""

    def __init__(self) -> None:
        self.profile, self.asked = Profile(version=1), 0
        self.away = False

    async def read(self, tenant: str, user: str) -> Profile:
        self.asked += 1
        if self.away:
            raise StoreUnavailable("away")
        return self.profile


async def test_a_profile_is_read_once_and_again_after_each_change(redis: Redis) -> None:
    primary = Primary()
    profiles = ProfileCache(redis, primary.read)
    try:
        assert [await profiles.of("t", "alice") for _ in range(3)] == [primary.profile] * 3
        assert primary.asked == 1
        token = await profiles.pending("t", ["alice", "bob"], 5)
        primary.profile = Profile(version=2, reach=("email",))
        assert await profiles.of("t", "alice") == primary.profile, "under a mark the primary is asked"
        await profiles.settled("t", ["alice", "bob"], token)
        assert [await profiles.of("t", "alice") for _ in range(3)] == [primary.profile] * 3
        assert primary.asked == 3
        primary.away = True
        assert await profiles.of("t", "alice") == primary.profile, "what is kept is there without PostgreSQL"
        with pytest.raises(StoreUnavailable):
            await profiles.of("u", "alice")
    finally:
        await profiles.close()


async def test_a_mark_outlasts_its_transaction_by_fifty_seconds_and_then_ends(redis: Redis) -> None:
    profiles = ProfileCache(redis, Primary().read)
    try:
        await profiles.pending("t", [f"user-{n}" for n in range(1200)], 10)
        assert 59_000 < await redis.pttl(cache._key("t", "user-1199")) <= 60_000
    finally:
        await profiles.close()


async def test_without_redis_readers_ask_the_primary_and_nothing_may_be_changed() -> None:
    nobody = Redis(host="127.0.0.1", port=1)
    profiles = ProfileCache(nobody, Primary().read)
    try:
        assert (await profiles.of("t", "alice")).version == 1
        with pytest.raises(StoreUnavailable):
            await profiles.pending("t", ["alice"], 5)
        await profiles.settled("t", ["alice"], "x")  # it was committed: nothing to say but a warning
    finally:
        await nobody.aclose()
        await profiles.close()


async def test_what_another_version_has_stored_is_read_from_the_primary(redis: Redis) -> None:
    profiles = ProfileCache(redis, Primary().read)
    await redis.hset(KEY, "body", b'{"version":"new"}')  # type: ignore[misc]
    try:
        assert (await profiles.of("t", "alice")).version == 1
    finally:
        await profiles.close()
