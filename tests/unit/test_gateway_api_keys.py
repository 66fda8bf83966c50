"""API keys: which are known, for how long an answer of the store is remembered, and what guessing costs whom."""

import asyncio
import hashlib
import time

import pytest

from gateway.access.api_keys import ApiKeys, Holder, KeysAway, PostgresKeys, TooManyGuesses
from gateway.access.principals import Service
from gateway.limits import API_KEY_RETRY_SECONDS, API_KEY_STALE_SECONDS


class Table(PostgresKeys):
    """A store of keys that can go away."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Holder] = {}
        self.asked = 0
        self.away = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def find(self, key_hash: bytes) -> Holder | None:
        self.asked += 1
        await asyncio.sleep(0)
        await self.answers.wait()
        if self.away:
            raise OSError("away")
        return self.rows.get(key_hash)

    async def close(self) -> None:
        pass


async def looked_up(keys: ApiKeys) -> None:
    """Returns once no look-up is under way."""
    await asyncio.gather(*keys._asking.values(), return_exceptions=True)


async def test_an_api_key_known_or_not_is_asked_for_once_a_minute() -> None:

    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    assert await asyncio.gather(*(keys.find("k") for _ in range(20))) == [None] * 20
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset({"events:write"}))
    assert await keys.find("k") is None
    assert table.asked == 1
    now[0] = 61
    found = await keys.find("k")
    assert found is not None
    assert isinstance(found, Service)
    table.rows.clear()
    assert await keys.find("k") is not None
    now[0] = 122
    assert await keys.find("k") is None
    assert table.asked == 3


async def test_while_the_store_is_away_keys_seen_before_go_on_and_others_do_not() -> None:

    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.away = True
    now[0] = 800
    assert await keys.find("k") is not None
    with pytest.raises(KeysAway):
        await keys.find("other")
    table.away = False
    assert await keys.find("other") is None


async def test_a_key_that_cannot_be_confirmed_for_a_quarter_of_an_hour_is_believed_no_longer() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    key_hash = hashlib.sha256(b"k").digest()
    table.rows[key_hash] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.away = True
    for second in range(0, int(API_KEY_STALE_SECONDS), 10):
        now[0] = second
        assert await keys.find("k") is not None
    now[0] = API_KEY_STALE_SECONDS
    with pytest.raises(KeysAway):
        await keys.find("k")
    table.away = False
    now[0] += API_KEY_RETRY_SECONDS
    with pytest.raises(KeysAway):  # looked up behind this one
        await keys.find("k")
    await looked_up(keys)
    assert await keys.find("k") is not None


async def test_a_key_revoked_while_the_store_was_away_ends_once_it_is_back() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.away = True
    now[0] = 100
    assert await keys.find("k") is not None
    table.away = False
    table.rows.clear()
    now[0] += API_KEY_RETRY_SECONDS
    await keys.find("k")
    await looked_up(keys)
    assert await keys.find("k") is None


async def test_a_key_that_is_used_is_confirmed_behind_its_requests() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    await keys.find("k")
    table.answers.clear()
    now[0] = 31
    async with asyncio.timeout(30):  # the store does not answer
        assert await keys.find("k") is not None
        while table.asked < 2:
            await asyncio.sleep(0)
    table.answers.set()


async def test_the_time_of_a_key_ends_while_it_is_remembered_and_while_the_store_is_away() -> None:
    now, table, expires_at = [0.0], Table(), time.time() + 60
    wall = [time.time()]
    keys = ApiKeys(table, now=lambda: now[0], wall=lambda: wall[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset(), expires_at)
    assert await keys.find("k") is not None
    table.away = True
    wall[0] = expires_at
    assert await keys.find("k") is None


async def test_keys_never_seen_before_reach_the_store_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_PER_MINUTE", 60)
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_AT_ONCE", 60)
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    found = await asyncio.gather(*(keys.find(f"guess{number}") for number in range(500)), return_exceptions=True)
    assert table.asked == 60
    assert sum(isinstance(one, KeysAway) for one in found) == 500 - 59
    now[0] = 61
    assert await keys.find("k") is not None
    assert table.asked == 61


async def test_an_address_that_guesses_keys_uses_up_no_look_ups_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_PER_MINUTE", 20)
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_AT_ONCE", 20)
    table = Table()
    keys = ApiKeys(table, guesses_per_minute=10, now=lambda: 0.0)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    guesses = (keys.find(f"guess{number}", lambda: "1.2.3.4") for number in range(100))
    await asyncio.gather(*guesses, return_exceptions=True)
    assert await keys.find("k", lambda: "5.6.7.8") is not None


async def test_an_address_that_guesses_keys_is_stopped_and_no_other_one() -> None:
    table = Table()
    keys = ApiKeys(table, guesses_per_minute=10, now=lambda: 0.0)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    guesses = (keys.find(f"guess{number}", lambda: "1.2.3.4") for number in range(100))
    found = await asyncio.gather(*guesses, return_exceptions=True)
    assert sum(isinstance(one, TooManyGuesses) for one in found) == 90
    with pytest.raises(TooManyGuesses):
        await keys.find("k", lambda: "1.2.3.4")
    assert table.asked == 10
    for _ in range(30):
        assert await keys.find("k", lambda: "5.6.7.8") is not None
    assert await keys.find("k", lambda: "1.2.3.4") is not None  # it is known now


async def test_a_service_that_begins_with_many_requests_at_once_is_not_taken_for_one_that_guesses() -> None:
    table = Table()
    keys = ApiKeys(table, guesses_per_minute=10, now=lambda: 0.0)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    found = await asyncio.gather(*(keys.find("k", lambda: "1.2.3.4") for _ in range(100)))
    assert all(one is not None for one in found)
    assert table.asked == 1
    # A key that is none costs one guess, however often it comes at once.
    assert await asyncio.gather(*(keys.find("guess", lambda: "1.2.3.4") for _ in range(100))) == [None] * 100
    for number in range(9):
        assert await keys.find(f"guess{number}", lambda: "1.2.3.4") is None
    with pytest.raises(TooManyGuesses):
        await keys.find("one more", lambda: "1.2.3.4")


async def test_a_flood_of_unknown_api_keys_pushes_out_none_that_is_used() -> None:
    table = Table()
    keys = ApiKeys(table, cache_size=3)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    for number in range(10):
        assert await keys.find(f"guess{number}") is None
    table.away = True
    assert await keys.find("k") is not None


async def test_a_revoked_api_key_is_not_remembered_as_a_known_one() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.rows.clear()
    for at in (100, 101):
        now[0] = at
        assert await keys.find("k") is None


async def test_the_memory_of_api_keys_is_bounded() -> None:
    table = Table()
    keys = ApiKeys(table, cache_size=3)
    for number in range(10):
        table.rows[hashlib.sha256(b"k%d" % number).digest()] = Service("acme", frozenset())
        await keys.find(f"k{number}")
        await keys.find(f"unknown{number}")
    assert (len(keys._known), len(keys._unknown)) == (3, 3)
    assert await keys.find("x" * 10_000) is None
