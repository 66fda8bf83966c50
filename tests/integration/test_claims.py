"""Claims on a real Valkey: who published an event id first, and what happens while nobody can say."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.dispatch import claims as module
from engine.dispatch.claims import Claim, Claims, ClaimsUnavailable, claim_key
from ops.dev.servers import Valkey
from tests.support.logs import eventually, redis_at
from tests.support.network import bad_network
from tests.support.waiting import ended


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a while is not a Redis that does not answer."""
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 30.0)


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    async with redis_at(valkey.url) as client:
        yield client


@pytest.fixture
async def make(redis: Redis) -> AsyncIterator[Callable[..., Claims]]:
    """Makes claims on the server and closes them at the end."""
    made: list[Claims] = []

    def claims(**options: int) -> Claims:
        made.append(Claims(redis, **options))
        return made[-1]

    yield claims
    for each in made:
        await each.close()


def claim(event_id: str, seq: int, *, tenant: str = "default", epoch: str = "ev1") -> Claim:
    return Claim(tenant, event_id, f"{epoch}.{seq}")


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"{name}_total", labels) or 0.0


async def test_the_first_to_claim_keeps_it_and_recognises_itself(redis: Redis, make: Callable[..., Claims]) -> None:
    claims = make()
    assert await claims.take([claim("e1", 5), claim("e2", 6)]) == [True, True]
    assert await claims.take([claim("e1", 5), claim("e2", 9)]) == [True, False]
    # Another process, and a position of the same number in another incarnation of EVENTS.
    assert await make().take([claim("e1", 5), claim("e1", 5, epoch="ev2")]) == [True, False]


async def test_a_claim_of_an_earlier_incarnation_is_that_of_the_event_it_held(
    redis: Redis, make: Callable[..., Claims]
) -> None:
    """EVENTS was restored from a backup: the same event has the same number in another incarnation."""
    claims = make()
    assert await claims.take([claim("e1", 5), claim("e2", 6)]) == [True, True]
    again = [Claim("default", "e1", "ev2.5", ("ev1.5", "ev0.5")), Claim("default", "e2", "ev2.7", ("ev1.7",))]
    assert await claims.take(again) == [True, False]


async def test_within_one_batch_the_first_one_wins(redis: Redis, make: Callable[..., Claims]) -> None:
    assert await make().take([claim("e1", 5), claim("e1", 6), claim("e1", 5)]) == [True, False, True]


async def test_tenants_do_not_share_event_ids(redis: Redis, make: Callable[..., Claims]) -> None:
    taken = [claim("e1", 5), claim("e1", 6, tenant="acme"), claim("e2", 7), claim("e1", 8, tenant="acme")]
    assert await make().take(taken) == [True, True, True, False]
    assert await redis.get(claim_key("acme", "e1")) == b"ev1.6"


async def test_a_claim_lives_for_the_horizon_and_reading_it_again_does_not_prolong_it(
    redis: Redis, make: Callable[..., Claims]
) -> None:
    await make(horizon_seconds=100).take([claim("e1", 5)])
    assert 90 < await redis.ttl(claim_key("default", "e1")) <= 100
    await make(horizon_seconds=1000).take([claim("e1", 5), claim("e1", 6)])
    assert await redis.ttl(claim_key("default", "e1")) <= 100
    await make().take([claim("e2", 6)])
    assert await redis.ttl(claim_key("default", "e2")) > 71 * 3600


async def test_a_batch_of_a_thousand_claims_of_many_tenants_is_taken_whole(
    redis: Redis, make: Callable[..., Claims]
) -> None:
    taken = [claim(f"e{i}", i, tenant=f"t{i % 7}") for i in range(1000)]
    assert await make().take(taken) == [True] * 1000
    assert await make().take([claim(f"e{i}", i + 1, tenant=f"t{i % 7}") for i in range(1000)]) == [False] * 1000
    assert await make().take([]) == []


async def test_takers_at_the_same_time_get_each_their_own_answer(make: Callable[..., Claims]) -> None:
    claims = make()
    batches = [[claim(f"e{i}", taker) for i in range(50)] for taker in range(8)]
    answers = await asyncio.gather(*map(claims.take, batches))
    assert [sum(answer) for answer in zip(*answers, strict=True)] == [1] * 50


async def test_claims_go_on_when_the_server_has_forgotten_the_script_or_closed_the_connection(
    redis: Redis, make: Callable[..., Claims]
) -> None:
    claims = make()
    await claims.take([claim("e1", 1)])
    await redis.script_flush()
    assert await claims.take([claim("e2", 2)]) == [True]
    await redis.client_kill_filter(_type="normal", skipme=True)
    assert await claims.take([claim("e1", 3), claim("e3", 4)]) == [False, True]


async def test_a_take_that_was_cut_off_does_not_give_its_answer_to_the_next(valkey: Valkey) -> None:
    async with bad_network(valkey.port) as network, Redis.from_url(f"redis://127.0.0.1:{network.port}/0") as far:
        claims = Claims(far)
        await claims.take([claim("warm", 0)])
        network.to_client.silence()
        late = asyncio.create_task(claims.take([claim("e1", 1)]), name="late")
        await eventually(lambda: network.to_client.held)  # its answer is on the way
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        network.restore()
        assert await claims.take([claim("e2", 2), claim("warm", 9)]) == [True, False]
        await claims.close()


async def test_a_redis_that_does_not_answer_costs_its_deadline_once_and_then_nothing(
    valkey: Valkey, redis: Redis, make: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = make()
    await claims.take([claim("e1", 5)])
    valkey.suspend()
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(ClaimsUnavailable):
        await claims.take([claim("e2", 6)])
    for _ in range(100):
        with pytest.raises(ClaimsUnavailable):
            await claims.take([claim("e3", 7)])
    assert time.monotonic() - started < 15  # were each to wait for its deadline, it would be half a minute
    valkey.resume()
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 30.0)
    assert await eventually(lambda: taken(claims, claim("e3", 7))) == [True]
    # What timed out may have been stored or not: either way it is ours.
    assert await claims.take([claim("e2", 6)]) == [True]


async def test_a_redis_that_is_gone_is_unavailable_and_used_again_when_it_is_back(
    valkey: Valkey, redis: Redis, make: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.05)
    claims = make()
    await claims.take([claim("e1", 5)])
    valkey.kill()
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 2.0)
    with pytest.raises(ClaimsUnavailable):
        await claims.take([claim("e2", 6)])
    valkey.start()
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 30.0)
    assert await eventually(lambda: taken(claims, claim("e2", 6))) == [True]


async def test_claims_owed_are_paid_before_the_next_are_taken(
    valkey: Valkey, redis: Redis, make: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 2.0)
    before = counted("seamark_claims_missed", fate="owed")
    claims = make()
    valkey.kill()
    missed = [claim(f"e{i}", i) for i in range(1200)]
    with pytest.raises(ClaimsUnavailable):
        await claims.take(missed)
    claims.owe(missed)
    valkey.start()
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 30.0)
    assert await eventually(lambda: taken(claims, claim("e1199", 5000))) == [False]
    assert await redis.dbsize() == 1200
    assert counted("seamark_claims_missed", fate="owed") == before + 1200


async def test_payment_interrupted_half_way_is_completed_later(
    valkey: Valkey, redis: Redis, make: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.05)
    claims = make()
    await claims.take([claim("warm", 1)])
    owed = [claim(f"e{i}", i) for i in range(1200)]
    claims.owe(owed)
    valkey.suspend()
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 0.3)
    with pytest.raises(ClaimsUnavailable):
        await claims.take([claim("x", 5000)])
    assert len(claims._owed) == 1200
    valkey.resume()
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 30.0)
    assert await eventually(lambda: taken(claims, claim("e7", 5001))) == [False]
    assert await claims.take(owed) == [True] * 1200
    assert not claims._owed


async def test_the_list_of_what_is_owed_is_bounded_and_the_overflow_counted(
    redis: Redis, make: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLAIMS_OWED_MAX", 10)
    owed, lost = counted("seamark_claims_missed", fate="owed"), counted("seamark_claims_missed", fate="lost")
    claims = make()
    claims.owe([claim(f"e{i}", i) for i in range(7)])
    claims.owe([claim(f"f{i}", i) for i in range(7)])
    claims.owe([claim(f"g{i}", i) for i in range(7)])
    assert len(claims._owed) == 10
    assert counted("seamark_claims_missed", fate="owed") == owed + 10
    assert counted("seamark_claims_missed", fate="lost") == lost + 11


async def test_a_full_redis_is_unavailable_not_an_eviction(redis: Redis, make: Callable[..., Claims]) -> None:
    claims = make()
    assert await claims.take([claim("e1", 5)]) == [True]
    await redis.config_set("maxmemory", "1")
    with pytest.raises(ClaimsUnavailable):
        await claims.take([claim("e2", 6)])
    assert await redis.get(claim_key("default", "e1")) == b"ev1.5"


async def test_a_redis_that_has_lost_its_claims_is_noticed_and_counted_once(
    valkey: Valkey, redis: Redis, make: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TAKE_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.02)
    name = "seamark_claims_horizon_restarts"
    start = counted(name)
    async with watching(make()), watching(make()):
        await eventually(lambda: counted(name) == start + 1)  # empty: no sentinel
        valkey.restart(kill=True)
        await eventually(lambda: counted(name) == start + 2)
        await redis.flushall()
        await eventually(lambda: counted(name) == start + 3)
        for _ in range(5):
            await redis.ping()
            await asyncio.sleep(0.02)
        assert counted(name) == start + 3


async def test_what_is_owed_is_paid_though_no_event_comes(
    redis: Redis, make: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.02)
    claims = make()
    claims.owe([claim("e1", 5)])
    async with watching(claims):
        await eventually(lambda: redis.get(claim_key("default", "e1")))


async def taken(claims: Claims, one: Claim) -> list[bool] | None:
    try:
        return await claims.take([one])
    except (ClaimsUnavailable, RedisError):
        return None


@contextlib.asynccontextmanager
async def watching(claims: Claims) -> AsyncIterator[None]:
    task = asyncio.create_task(claims.watch(), name="claims-watch")
    try:
        yield
        assert not task.done()
    finally:
        await ended(task)
