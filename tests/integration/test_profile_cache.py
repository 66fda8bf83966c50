"""The cache of profiles against a real Valkey, while writers, readers and Redis itself are stopped at any step.

PostgreSQL is a number here, which changes at once: what is held is the order of steps. The scripts are the real ones. A mark or a
lease that has run out is written as such into Valkey, so no test waits for a minute.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from random import Random
from typing import Any

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from engine.errors import StoreUnavailable
from engine.plan.profile import Profile
from engine.profiles import cache
from engine.profiles.cache import ProfileCache
from ops.dev.servers import Valkey
from seamark.protocol.errors import InvalidToken

SCRIPTS = {"look": cache._LOOK, "fill": cache._FILL, "mark": cache._MARK, "settle": cache._SETTLE}
MINUTE_MS = 60_000
KEY = cache._key("t", "alice")


@pytest.fixture(autouse=True)
def redis_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: whoever gives Redis up asks the primary."""
    monkeypatch.setattr(cache, "REDIS_SECONDS", 20.0)


_LEFT = "return {redis.call('HGET', KEYS[1], 'body'), redis.call('PTTL', KEYS[1])}"
_ENDED = "if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then redis.call('HSET', KEYS[1], ARGV[1], 0) end"


class World:
    """Writers (mark, commit, settle) and readers (look, read, fill) of one user, each at its own pace, or stopped for good.

    Args:
        guarded: a writer whose mark may have run out does not commit (`Directory.changing`).
    """

    def __init__(self, redis: BlockingRedis, seed: int, scripts: Mapping[str, str], *, guarded: bool = True) -> None:
        self.redis, self.scripts, self.guarded = redis, scripts, guarded
        self.random = Random(seed)
        self.version = self.number = 0
        self.marked: list[str] = []  # writers before their commit
        self.ended: list[str] = []  # writers after it
        self.looked: list[str] = []  # readers with a lease, before they read
        self.read: list[tuple[str, int]] = []  # readers with a lease and what they have read
        self.reads = 0
        redis.delete(KEY)

    def run(self, name: str, *args: str | int | bytes) -> Any:
        return self.redis.eval(self.scripts[name], 1, KEY, *args)

    def step(self) -> None:
        """Anything that may happen next, and whether what is kept is still true."""
        choices = [self.mark, self.look, self.look, self.let_a_lease_run_out]
        choices += (
            [self.end_a_transaction, self.end_a_transaction, self.stop_a_writer] if self.marked else [self.lose_all]
        )
        choices += [self.settle, self.settle, self.die] if self.ended else []
        choices += [self.read_the_primary] * 2 if self.looked else []
        choices += [self.fill] * 2 if self.read else []
        self.random.choice(choices)()
        body, left = self.redis.eval(_LEFT, 1, KEY)
        assert body is None or int(body) == self.version, "an old profile is kept"
        assert left == -2 or 0 < left <= MINUTE_MS, "it is kept for ever, or longer than anything"

    def one_of(self, waiting: list[Any]) -> Any:
        return waiting.pop(self.random.randrange(len(waiting)))

    def token(self) -> str:
        self.number += 1
        return str(self.number)

    def mark(self) -> None:
        self.marked.append(self.token())
        self.run("mark", self.marked[-1], MINUTE_MS)

    def end_a_transaction(self) -> None:
        self.ended.append(self.one_of(self.marked))
        self.version += self.random.random() < 0.8  # else it is rolled back

    def settle(self) -> None:
        self.run("settle", self.one_of(self.ended))

    def die(self) -> None:
        """A writer that never settles; a minute later."""
        self.let_a_mark_run_out(self.one_of(self.ended))

    def stop_a_writer(self) -> None:
        """For a minute, before its commit."""
        token = self.one_of(self.marked)
        self.let_a_mark_run_out(token)
        if not self.guarded:
            self.marked.append(token)

    def let_a_mark_run_out(self, token: str) -> None:
        self.redis.eval(_ENDED, 1, KEY, f"mark:{token}")

    def look(self) -> None:
        token = self.token()
        [found] = self.run("look", token, MINUTE_MS)
        if found == b"yours":
            self.looked.append(token)
        elif found not in (b"marked", b"leased"):
            self.reads += 1

    def read_the_primary(self) -> None:
        self.read.append((self.one_of(self.looked), self.version))

    def fill(self) -> None:
        token, version = self.one_of(self.read)
        self.run("fill", token, str(version), MINUTE_MS)

    def let_a_lease_run_out(self) -> None:
        self.redis.eval(_ENDED, 1, KEY, "lease_until")

    def lose_all(self) -> None:
        """Redis has lost its data, while nobody was about to commit."""
        self.redis.delete(KEY)


def explore(valkey: Valkey, seeds: int, scripts: Mapping[str, str] = SCRIPTS, *, guarded: bool = True) -> int:
    """So many worlds of thirty steps; how many times a profile was found in the cache."""
    reads = 0
    with BlockingRedis.from_url(valkey.url) as redis:
        for seed in range(seeds):
            world = World(redis, seed, scripts, guarded=guarded)
            for number in range(30):
                try:
                    world.step()
                except AssertionError as error:
                    raise AssertionError(f"seed {seed}, step {number}: {error}") from error
            reads += world.reads
    return reads


def test_no_order_of_steps_and_deaths_leaves_an_old_profile(valkey: Valkey) -> None:
    assert explore(valkey, 200) > 50, "the cache was of use"


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
        explore(valkey, 500, **mutant)


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


async def test_many_are_read_together_and_each_gets_his_own(redis: Redis) -> None:
    asked = list[tuple[str, str]]()

    async def read(tenant: str, user: str) -> Profile:
        asked.append((tenant, user))
        return named(tenant, user)

    def named(tenant: str, user: str) -> Profile:
        return Profile(version=1, timezone=f"{tenant}/{user}")

    profiles = ProfileCache(redis, read)
    # More than one call looks for, of two tenants, and in no order.
    users = [("tu"[n % 300 // 200], f"user-{n * 7 % 300}") for n in range(300)]
    expected = [named(*user) for user in users]
    try:
        assert await profiles.of_all(users) == expected
        assert sorted(asked) == sorted(users)
        asked.clear()
        token = await profiles.pending("t", ["user-7"], 5)
        await redis.hset(cache._key("t", "user-14"), "body", b'{"version":"new"}')  # type: ignore[misc]
        assert await profiles.of_all(users) == expected
        assert sorted(asked) == [("t", "user-14"), ("t", "user-7")]
        await profiles.settled("t", ["user-7"], token)
        assert await profiles.of_all(users[::-1]) == expected[::-1]
        assert await profiles.of_all([]) == []
        asked.clear()
        alone = [profiles.of(*user) for user in (("t", "no\ud800body"), *users, ("t", "user-new"), ("t", "user-new"))]
        wrong, *each = await asyncio.gather(*alone, return_exceptions=True)
        assert isinstance(wrong, InvalidToken), "and nobody else has it told"
        assert each == [*expected, *[named("t", "user-new")] * 2]
        assert set(asked) == {("t", "user-14"), ("t", "user-new")}
    finally:
        await profiles.close()


async def test_a_mark_outlasts_its_transaction_by_fifty_seconds_and_then_ends(redis: Redis) -> None:
    profiles = ProfileCache(redis, Primary().read)
    try:
        began = time.monotonic()
        await profiles.pending("t", [f"user-{n}" for n in range(1200)], 10)
        left = await redis.pttl(cache._key("t", "user-1199"))
        assert 59_000 - (time.monotonic() - began) * 1000 < left <= 60_000
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
