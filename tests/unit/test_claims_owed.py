"""Claims that were missed while Redis was away: the list is bounded, and full it is counted, whatever happens meanwhile."""

import pytest
from redis.asyncio import Redis

from engine.dispatch import claims as module
from engine.dispatch.claims import Claim, Claims, ClaimsUnavailable


def some(count: int) -> list[Claim]:
    return [Claim("default", f"e{n}", f"abc.{n}") for n in range(count)]


async def test_what_is_owed_anew_while_others_are_written_in_vain_is_counted_as_lost(monkeypatch) -> None:
    monkeypatch.setattr(module, "CLAIMS_OWED_MAX", 10)
    owed = Claims(Redis.from_url("redis://127.0.0.1:1/0"))
    owed.owe(some(10))

    async def another_partition_owes_and_redis_goes_away(keys: object, args: object) -> None:
        owed.owe(some(4))
        raise ConnectionError

    monkeypatch.setattr(owed, "_take", another_partition_owes_and_redis_goes_away)
    with pytest.raises(ClaimsUnavailable):
        await owed.take(some(1))
    owed.owe(some(2))
    assert len(owed._owed) <= 14
