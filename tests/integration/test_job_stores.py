"""Claims and buckets on a real Valkey: what the scripts do is what the functions say; a server that forgot is noticed."""

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.asyncio import Connection, Redis
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from engine.channels.channel import Job, Outcome, key_of
from engine.channels.email.settings import DomainSettings
from engine.jobs import redisbucket, redisclaims
from engine.jobs.bucket import Level, Limit, refused, take
from engine.jobs.claims import ClaimsUnavailable, Done, Leased, Look, Waiting, believable
from engine.jobs.redisbucket import RedisBucket
from engine.jobs.redisclaims import RedisClaims
from engine.redisscript import RedisScript
from engine.worker.gates import Gates
from engine.worker.providers import Provider
from ops.dev.servers import Valkey
from tests.support.logs import eventually
from tests.support.network import bad_network

KEY = "acme/order-1/alice/push/phone"
LEASE = Leased(0, "me", 1, doubt=True)
WAITING = Waiting(1, datetime(2026, 11, 29, 12, 0, 0, 5000, tzinfo=UTC), None, Outcome(kind="transient", code="503"))
DONE = Done(1, "sent", "ok", Outcome(kind="ok", provider="sim", provider_id="p/1"))


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey.url) as client:
        yield client


@pytest.fixture
async def claims(redis: Redis) -> AsyncIterator[RedisClaims]:
    made = RedisClaims(redis)
    yield made
    await made.close()


async def test_a_claim_is_what_was_put_and_its_lease_ends_by_the_clock_of_the_server(claims: RedisClaims) -> None:
    look = await claims.look(KEY)
    assert look.claim is None
    assert look.born <= look.now
    for claim in (LEASE, WAITING, DONE):
        look = await claims.put(KEY, look, claim, lease_seconds=45 if claim is LEASE else 0, keep_seconds=100)
        assert look.claim == claim
        assert look.until - look.written == pytest.approx(45 if claim is LEASE else 0, abs=1e-5)
        again = await claims.look(KEY)
        assert again._replace(now=look.now) == look
        assert again.now >= look.now


async def test_of_two_that_expect_the_same_one_wins_and_the_other_sees_it(claims: RedisClaims) -> None:
    look = await claims.look(KEY)
    theirs = Leased(0, "they")
    found = await asyncio.gather(
        claims.put(KEY, look, LEASE, lease_seconds=45, keep_seconds=100),
        claims.put(KEY, look, theirs, lease_seconds=45, keep_seconds=100),
    )
    assert [one.claim for one in found] == [LEASE, LEASE]
    assert (await claims.look(KEY)).claim == LEASE


async def test_a_claim_leaves_when_its_time_is_over_and_other_jobs_have_their_own(
    redis: Redis, claims: RedisClaims
) -> None:
    await claims.put(KEY, await claims.look(KEY), DONE, keep_seconds=100)
    assert (await claims.look("acme/order-1/alice/push/tablet")).claim is None
    assert (await claims.look("other/order-1/alice/push/phone")).claim is None
    keys = sorted(await redis.keys())
    assert [key for key in keys if key.startswith(b"job:")] == [b"job:{acme}:order-1/alice/push/phone"]
    assert all([await redis.ttl(key) > 0 for key in keys]), "nothing stays for ever"
    assert 90 < await redis.ttl(keys[0]) <= 100


@pytest.mark.parametrize("tenant", ["}acme", "}", "a}b", "{acme}", "acme"])
async def test_all_claims_of_a_tenant_are_in_one_slot_of_a_cluster_whatever_it_is_called(
    redis: Redis, claims: RedisClaims, tenant: str
) -> None:
    for number in range(20):
        key = key_of(tenant, f"order-{number}", "alice", "sms", "")
        await claims.put(key, await claims.look(key), DONE, keep_seconds=100)
        assert claims.unbegun(key) is not None
    assert len(await redis.keys("job:*")) == 20
    assert len({key_slot(key) for key in await redis.keys("*")}) == 1


async def test_a_server_that_has_forgotten_takes_no_write_that_expects_what_was_before(
    redis: Redis, claims: RedisClaims
) -> None:
    look = await claims.look(KEY)
    await redis.flushall()
    found = await claims.put(KEY, look, LEASE, lease_seconds=45, keep_seconds=100)
    assert found.claim is None, "absent as expected, and yet not the absence that was seen"
    assert found.born > look.born


async def test_what_is_put_in_place_of_a_job_that_nobody_had_begun_is_stored_only_if_that_is_so(
    redis: Redis, claims: RedisClaims
) -> None:
    assert claims.unbegun(KEY) is None, "nothing was heard yet"
    heard = await claims.look("acme/order-2/alice/push/phone")
    assert claims.unbegun(KEY) == heard._replace(assumed=True)
    assert claims.unbegun("other/order-1/alice/push/phone") is None
    unbegun = claims.unbegun(KEY)
    assert unbegun is not None
    assert (await claims.put(KEY, unbegun, LEASE, lease_seconds=45, keep_seconds=100)).claim == LEASE
    assert (await claims.put(KEY, unbegun, DONE, keep_seconds=100)).claim == LEASE, "somebody was quicker"
    await redis.flushall()
    assert (await claims.put(KEY, unbegun, LEASE, lease_seconds=45, keep_seconds=100)).claim is None, "it has forgotten"


async def test_claims_that_are_asked_for_together_are_one_call_for_each_tenant(
    claims: RedisClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = "other/order-1/alice/push/phone"
    looks = [await claims.look(key) for key in (KEY, others)]
    writes, send = list[bytes](), Connection.send_packed_command

    async def counted(self: Connection, command: bytes, check_health: bool = True) -> None:
        writes.append(command)
        await send(self, command, check_health)

    monkeypatch.setattr(Connection, "send_packed_command", counted)
    found = await asyncio.gather(
        claims.put(KEY, looks[0], LEASE, lease_seconds=45, keep_seconds=100),
        claims.put(others, looks[1], WAITING, keep_seconds=100),
        claims.look(KEY),
        claims.look("acme/order-2/alice/push/phone"),
    )
    assert [one.claim for one in found] == [LEASE, WAITING, LEASE, None]
    assert [one.count(b"EVALSHA") for one in writes] == [2]


async def test_another_run_of_the_server_is_not_believed_what_it_may_have_missed(
    valkey: Valkey, redis: Redis, claims: RedisClaims
) -> None:
    """It has what was saved in time: a claim as it was then, and nothing of what came later."""
    first = await claims.put(KEY, await claims.look(KEY), LEASE, lease_seconds=45, keep_seconds=100)
    job = Job(id="order-1", tenant="acme", user="alice", type="a.b", channel="push", first_at=_at(first))
    assert believable(first, job)
    saved = {key: await redis.get(key) for key in await redis.keys()}
    valkey.kill()
    valkey.start()
    async with Redis.from_url(valkey.url) as anew:
        for key, value in saved.items():
            await anew.set(key, value)
    look = await eventually(lambda: looked(claims))
    assert look.claim == LEASE
    assert look.born > first.written
    assert not believable(look, job)
    anew = await claims.put(KEY, look, DONE, keep_seconds=100)
    assert anew.claim == DONE
    assert believable(anew, job)


def _at(look: Look) -> datetime:
    return datetime.fromtimestamp(look.now, UTC)


async def looked(claims: RedisClaims) -> Look | None:
    try:
        return await claims.look(KEY)
    except ClaimsUnavailable:
        return None


async def test_a_job_seen_untried_is_believed_from_that_moment_on(claims: RedisClaims) -> None:
    """To the microsecond: the very look that makes the store known says when."""
    look = await claims.look(KEY)
    job = Job(
        id="o", tenant="acme", user="alice", type="a.b", channel="push", first_at=datetime(2020, 1, 1, tzinfo=UTC)
    )
    assert not believable(look, job)
    seen = Job(
        id="o", tenant="acme", user="alice", type="a.b", channel="push", first_at=job.first_at, untried_at=_at(look)
    )
    assert believable(await claims.look(KEY), seen)


async def test_a_write_whose_answer_was_lost_is_recognised_as_ones_own(
    valkey: Valkey, claims: RedisClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redisclaims, "CLAIM_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(redisclaims, "PAUSE_SECONDS", 0.0)
    async with bad_network(valkey.port) as network, Redis.from_url(f"redis://127.0.0.1:{network.port}/0") as far:
        worker = RedisClaims(far)
        look = await worker.look(KEY)
        network.to_client.silence()
        with pytest.raises(ClaimsUnavailable):
            await worker.put(KEY, look, LEASE, lease_seconds=45, keep_seconds=100)
        network.restore()
        assert (await worker.put(KEY, look, LEASE, lease_seconds=45, keep_seconds=100)).claim == LEASE
        await worker.close()


async def test_a_redis_that_is_gone_is_unavailable_and_used_again_when_it_is_back(
    valkey: Valkey, claims: RedisClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redisclaims, "PAUSE_SECONDS", 0.05)
    before = await claims.look(KEY)
    valkey.kill()
    with pytest.raises(ClaimsUnavailable):
        await claims.look(KEY)
    valkey.start()
    assert (await eventually(lambda: looked(claims))).born > before.born


# --- the bucket ------------------------------------------------------------------------------------------------------


STEPS = [("take", 0.0), ("take", 0.0), ("take", 0.5), ("take", 2.0), ("refused", 0.0)]


async def test_the_bucket_answers_as_the_function_does_step_by_step(redis: Redis) -> None:
    """The script is given its time instead of asking for it, so that each answer can be foreseen."""
    clock = "local t = redis.call('TIME')\nlocal now = t[1] + t[2] / 1000000"
    assert clock in redisbucket._SCRIPT
    script = redisbucket._SCRIPT.replace(clock, "local now = tonumber(KEYS[2])")
    rng, kinds = random.Random(7), set()
    for number in range(40):
        limit, level, now = Limit(rng.uniform(0.5, 50), rng.randint(1, 5)), Level(), 1_800_000_000.0
        for _ in range(40):
            now = round(now + rng.choice((0.0, 0.001, 0.1, 1.0, 30.0)) * rng.random(), 6)
            step, most = rng.choice(STEPS)
            keys = (f"limit:{number}", repr(now))
            if step == "refused":
                await redis.eval(script, 2, *keys)
                level = refused(level, now)
            else:
                level, taken, seconds = take(level, limit, now, wait_seconds_max=most)
                answer = await redis.eval(script, 2, *keys, repr(limit.per_second), limit.burst, repr(most))
                assert bool(answer[0]) == taken
                assert float(answer[1]) == pytest.approx(seconds, abs=1e-4)
                kinds.add((taken, seconds > 0))
            # Go on from what is stored, so that roundings do not add up.
            held = Level(*(float(value) for value in await redis.hmget(keys[0], "until", "pace", "paced_at")))
            assert held == pytest.approx(level, abs=1e-4)
            level = held
    assert kinds == {(True, False), (True, True), (False, True)}


async def _now(redis: Redis) -> float:
    seconds, micros = await redis.time()
    return seconds + micros / 1e6


async def test_workers_together_do_not_exceed_the_limit(redis: Redis) -> None:
    limit = Limit(200, 20)
    workers = [RedisBucket(redis, "shared", limit) for _ in range(8)]
    slots: list[float] = []

    async def work(bucket: RedisBucket) -> None:
        for _ in range(100):
            asked = await _now(redis)
            taken, seconds = await bucket.take(wait_seconds_max=3600)
            assert taken
            slots.append(asked + seconds)

    began = await _now(redis)
    await asyncio.gather(*map(work, workers))
    for each in workers:
        await each.close()
    # 800 slots at 200 a second, 20 of them at once: the last is no earlier than it may be.
    assert max(slots) - began >= (800 - 20) / 200 - 0.05


async def test_a_refusal_halves_what_all_workers_get(redis: Redis) -> None:
    one, other = (RedisBucket(redis, "shared", Limit(10)) for _ in range(2))
    await one.refused()
    ends = []
    for bucket in (other, one, other):
        taken, _ = await bucket.take(wait_seconds_max=3600)
        assert taken
        ends.append(float(await redis.hget("limit:{shared}", "until") or 0))
    # At the contract's rate they would be a tenth of a second apart; the pace comes back within minutes.
    assert ends[1] - ends[0] > 0.15
    assert ends[2] - ends[1] > 0.15
    for bucket in (one, other):
        await bucket.close()


_SAY = "if ARGV[1] == 'wrong' then return redis.error_reply('it is wrong') end return ARGV[1] .. redis.call('INCR', KEYS[1])"


async def test_calls_of_a_script_that_are_made_together_have_each_their_own_answer_or_error(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, writes = RedisScript(redis, _SAY), list[bytes]()
    send = Connection.send_packed_command

    async def counted(self: Connection, command: bytes, check_health: bool = True) -> None:
        writes.append(command)
        await send(self, command, check_health)

    monkeypatch.setattr(Connection, "send_packed_command", counted)
    for _ in range(2):  # known to the server, and forgotten by it
        await redis.delete("n")
        await redis.script_flush()
        writes.clear()
        said = await asyncio.gather(*(script(["n"], [word]) for word in ("a", "wrong", "b")), return_exceptions=True)
        assert said[0] == b"a1"
        assert isinstance(said[1], ResponseError)
        assert said[2] == b"b2"
        assert len([one for one in writes if b"EVAL" in one]) == 2, "all by their name, then all by their text"
    await script.close()


async def test_only_calls_without_an_answer_are_made_again_when_a_connection_is_lost(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = RedisScript(redis, _SAY)
    await redis.delete("n")
    assert await script(["n"], ["a"]) == b"a1"
    answers, read = iter((True, False)), Connection.read_response

    async def cut(self: Connection) -> object:
        if next(answers, True):
            return await read(self)
        await self.disconnect()
        raise RedisConnectionError

    monkeypatch.setattr(Connection, "read_response", cut)
    assert await asyncio.gather(script(["n"], ["b"]), script(["n"], ["c"])) == [b"b2", b"c4"], (
        "c was made twice, b once"
    )
    await script.close()


async def test_a_domain_of_recipients_has_a_limit_of_its_own_which_all_workers_share(redis: Redis) -> None:
    own: Any = Provider(
        "own", None, channel_name="email", domains={"gmail.com": DomainSettings(per_second=0.01, burst=2)}
    )  # type: ignore[arg-type]
    first, second = Gates(redis), Gates(redis)
    try:
        taken = [await gates.of(own, "gmail.com").enter(wait_seconds_max=0) for gates in (first, second, first, second)]
        assert [seconds == 0 for seconds in taken] == [True, True, False, False]
        assert [await first.of(own, "other.example").enter(wait_seconds_max=0) for _ in range(5)] == [0] * 5
    finally:
        await first.close()
        await second.close()
