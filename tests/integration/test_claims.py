"""Claims on a real Valkey: whose event it is, through lost scripts, closed connections and a server that is away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from engine.claims import Claim, Claims, ClaimsUnavailable
from seamark.dev.servers import Valkey
from tests.support.logs import eventually


@contextlib.asynccontextmanager
async def claiming(valkey: Valkey) -> AsyncIterator[tuple[Claims, Redis]]:
    async with Redis.from_url(valkey.url) as redis:
        claims = Claims(redis)
        try:
            yield claims, redis
        finally:
            await claims.close()


def claim(id: str, position: str, tenant: str = "default") -> Claim:
    return Claim(tenant, id, position)


async def test_an_event_keeps_its_claim_and_another_with_its_id_is_a_duplicate(valkey: Valkey) -> None:
    async with claiming(valkey) as (claims, _):
        assert await claims.take([claim("e1", "a.1"), claim("e2", "a.2")]) == [True, True]
        assert await claims.take([claim("e1", "a.1"), claim("e2", "a.3"), claim("e3", "a.4")]) == [True, False, True]
        assert await claims.take([claim("e1", "a.9", tenant="other"), claim("e1", "a.9")]) == [True, False]


async def test_takers_at_the_same_time_get_each_their_own_answer(valkey: Valkey) -> None:
    async with claiming(valkey) as (claims, _):
        batches = [[claim(f"e{i}", f"a.{taker}") for i in range(50)] for taker in range(8)]
        answers = await asyncio.gather(*map(claims.take, batches))
    assert [sum(answer) for answer in zip(*answers, strict=True)] == [1] * 50


async def test_claims_go_on_when_the_server_has_forgotten_the_script_or_closed_the_connection(valkey: Valkey) -> None:
    async with claiming(valkey) as (claims, redis):
        await claims.take([claim("e1", "a.1")])
        await redis.script_flush()
        assert await claims.take([claim("e2", "a.2")]) == [True]
        await redis.client_kill_filter(_type="normal", skipme=True)
        assert await claims.take([claim("e1", "a.3"), claim("e3", "a.4")]) == [False, True]


async def test_a_take_that_was_cut_off_does_not_give_its_answer_to_the_next(valkey: Valkey) -> None:
    async with claiming(valkey) as (claims, _):
        await claims.take([claim("warm", "a.0")])
        valkey.suspend()
        late = asyncio.create_task(claims.take([claim("e1", "a.1")]))
        await asyncio.sleep(0.05)  # the command is on its way, its answer cannot be
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        valkey.resume()
        assert await claims.take([claim("e2", "a.2"), claim("warm", "b.1")]) == [True, False]


async def test_a_server_that_is_away_is_said_to_be_and_taken_up_again(valkey: Valkey) -> None:
    async with claiming(valkey) as (claims, _):
        await claims.take([claim("e1", "a.1")])
        await asyncio.to_thread(valkey.kill)
        with pytest.raises(ClaimsUnavailable):
            await claims.take([claim("e2", "a.2")])
        valkey.prepare()
        valkey.spawn()
        await asyncio.to_thread(valkey.wait_ready)

        async def taken() -> list[bool] | None:
            with contextlib.suppress(ClaimsUnavailable):
                return await claims.take([claim("e2", "a.2")])
            return None

        assert await eventually(taken) == [True]
