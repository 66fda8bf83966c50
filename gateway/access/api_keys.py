"""API keys of services: looked up by hash in PostgreSQL, believed for a minute, and for a quarter of an hour while it is away.

Anybody can send invalid keys, so look-ups of keys never seen before are bounded and can take only some of the connections.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import nullcontext

import asyncpg
import msgspec
import structlog

from engine.buckets import Buckets
from engine.postgres import Pool, lazy_pool
from gateway import metrics
from gateway.access.key_table import hash_of
from gateway.access.principals import Operator, Service
from gateway.limits import (
    API_KEY_CACHE,
    API_KEY_CONNECTIONS,
    API_KEY_FIRST_AT_A_TIME,
    API_KEY_FIRST_AT_ONCE,
    API_KEY_FIRST_PER_MINUTE,
    API_KEY_QUERY_SECONDS,
    API_KEY_RENEW_SECONDS,
    API_KEY_RETRY_SECONDS,
    API_KEY_SECONDS,
    API_KEY_STALE_SECONDS,
    TOKEN_BYTES,
)

_log = structlog.get_logger("seamark.api_keys")

Holder = Service | Operator
"""Who holds a key."""


class KeysAway(Exception):
    """The key cannot be looked up at the moment, and is not remembered."""


class TooManyGuesses(Exception):
    """This address has sent too many invalid keys: for a while no key it sends is looked up unless it is known already."""


class PostgresKeys:
    """The table `api_keys`, over a pool that connects when first needed: a gateway starts without PostgreSQL."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def find(self, key_hash: bytes) -> Holder | None:
        """Who holds the key with this SHA-256, unless it was revoked or has expired.

        Raises:
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError: PostgreSQL does not answer.
        """
        connection = await self._pool.acquire()
        try:
            row = await connection.fetchrow(
                "SELECT id, tenant, scopes, extract(epoch FROM expires_at)::float8 AS expires_at FROM api_keys"
                " WHERE key_hash = $1 AND revoked_at IS NULL"
                " AND (expires_at IS NULL OR expires_at > now())",
                key_hash,
                timeout=API_KEY_QUERY_SECONDS,
            )
        except BaseException:
            connection.terminate()  # the pool would wait for a silent server to confirm that it gives up the query
            raise
        finally:
            await self._pool.release(connection)
        if row is None:
            return None
        if row["tenant"] is None:
            return Operator(row["expires_at"], row["id"])
        return Service(row["tenant"], frozenset(row["scopes"]), row["expires_at"])

    async def close(self) -> None:
        """Close the connections, whatever they are doing."""
        self._pool.terminate()


async def postgres_keys(url: str) -> PostgresKeys:
    """The keys in the database at `url`."""
    return PostgresKeys(await lazy_pool(url, API_KEY_CONNECTIONS, connect_seconds=API_KEY_QUERY_SECONDS))


class _Remembered(msgspec.Struct):
    """What is known of a key, when it was last confirmed, and whether the look-up since then has failed."""

    holder: Holder | None
    confirmed_at: float
    failed_at: float | None = None


class ApiKeys:
    """Remembers for each key what the store said about it, also that there is no such key.

    Args:
        store: where keys are kept.
        guesses_per_minute: how many invalid keys one address may have looked up in a minute; 0: no bound.
        now: monotonic clock in seconds.
        wall: wall clock in Unix seconds.
    """

    def __init__(
        self,
        store: PostgresKeys,
        *,
        guesses_per_minute: float = 0,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        cache_size: int = API_KEY_CACHE,
    ) -> None:
        self._store = store
        self._now = now
        self._wall = wall
        self._cache_size = cache_size
        self._known: dict[bytes, _Remembered] = {}
        # Kept apart: whoever tries thousands of keys must not push out those that services use.
        self._unknown: dict[bytes, _Remembered] = {}
        self._asking: dict[bytes, asyncio.Task[Holder | None]] = {}
        self._guesses = Buckets(guesses_per_minute, now=now)
        self._first = Buckets(API_KEY_FIRST_PER_MINUTE, burst=API_KEY_FIRST_AT_ONCE, now=now)
        self._away_said_at = -1e9
        self._first_at_a_time = asyncio.Semaphore(API_KEY_FIRST_AT_A_TIME)

    async def find(self, key: str, address: Callable[[], str] = str) -> Holder | None:
        """Who holds `key`; None: there is no such key.

        Args:
            key: as it was presented.
            address: gives the address that presented it; called only where it is needed.

        Raises:
            KeysAway: PostgreSQL does not answer and has not confirmed this key for a quarter of an hour, or too many keys
                never seen before are being looked up.
            TooManyGuesses: this address has presented too many invalid keys.
        """
        if not 1 <= len(key) <= TOKEN_BYTES:
            return None
        key_hash = hash_of(key)
        known = self._known.get(key_hash)
        if known is not None:
            found = await self._meet_again(key_hash, known)
        else:
            found = await self._meet(key_hash, address() if self._guesses.bounded else "")
        return None if found is None or self._expired(found) else found

    async def close(self) -> None:
        """Give up look-ups under way and close the store."""
        for task in list(self._asking.values()):
            task.cancel()
        await self._store.close()

    def _expired(self, holder: Holder) -> bool:
        """The time of a key may end while it is remembered."""
        return holder.expires_at is not None and holder.expires_at <= self._wall()

    async def _meet_again(self, key_hash: bytes, known: _Remembered) -> Holder | None:
        age = self._now() - known.confirmed_at
        if age < API_KEY_RENEW_SECONDS:
            metrics.gateway_api_keys.labels("cached").inc()
            return known.holder
        renewing = None
        if known.failed_at is None or self._now() - known.failed_at >= API_KEY_RETRY_SECONDS:
            renewing = self._ask(key_hash)
        if age < API_KEY_SECONDS:
            metrics.gateway_api_keys.labels("cached").inc()
            return known.holder
        # At most one request a minute waits, and none while PostgreSQL is known to be away.
        if renewing is not None and known.failed_at is None:
            try:
                return await asyncio.shield(renewing)
            except KeysAway:
                age = self._now() - known.confirmed_at
        if age >= API_KEY_STALE_SECONDS:
            metrics.gateway_api_keys.labels("failed").inc()
            raise KeysAway("API keys cannot be checked at the moment")
        metrics.gateway_api_keys.labels("outlived").inc()
        return known.holder

    async def _meet(self, key_hash: bytes, address: str) -> Holder | None:
        """A key never seen before, or one that was none."""
        unknown = self._unknown.get(key_hash)
        if unknown is not None and self._now() - unknown.confirmed_at < API_KEY_SECONDS:
            metrics.gateway_api_keys.labels("cached").inc()
            return None
        if key_hash in self._asking:  # one look-up, and one guess, however many come with it at once
            return await asyncio.shield(self._ask(key_hash, first=True))
        if not self._guesses.take(address):  # beforehand, so that many at once do not get past the bound
            metrics.gateway_api_keys.labels("guessed").inc()
            raise TooManyGuesses("too many invalid keys came from this address")
        guessed = False
        try:
            if not self._first.take(""):
                metrics.gateway_api_keys.labels("failed").inc()
                raise KeysAway("too many keys that were never used here are being looked up")
            found = await asyncio.shield(self._ask(key_hash, first=True))
            guessed = found is None
            return found
        finally:
            if not guessed:
                self._guesses.give_back(address)

    def _ask(self, key_hash: bytes, *, first: bool = False) -> asyncio.Task[Holder | None]:
        """The look-up of a key. Everybody who asks for this key meanwhile shares it."""
        task = self._asking.get(key_hash)
        if task is None:
            task = self._asking[key_hash] = asyncio.create_task(self._look_up(key_hash, first), name="api-key")
            task.add_done_callback(lambda done: self._asked(key_hash, done))
        return task

    def _asked(self, key_hash: bytes, task: asyncio.Task[Holder | None]) -> None:
        del self._asking[key_hash]
        if not task.cancelled():
            task.exception()  # told to those who wait, if any still do

    async def _look_up(self, key_hash: bytes, first: bool) -> Holder | None:
        try:
            async with asyncio.timeout(API_KEY_QUERY_SECONDS), self._first_at_a_time if first else nullcontext():
                found = await self._store.find(key_hash)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            known = self._known.get(key_hash)
            if self._now() - self._away_said_at >= API_KEY_RETRY_SECONDS:  # one line for hundreds of invalid keys
                self._away_said_at = self._now()
                _log.warning("api_keys_away", error=type(error).__name__, detail=str(error)[:200])
            if known is not None:
                known.failed_at = self._now()
            else:
                metrics.gateway_api_keys.labels("failed").inc()
            raise KeysAway("API keys cannot be checked at the moment") from error
        metrics.gateway_api_keys.labels("queried").inc()
        self._remember(key_hash, found)
        return found

    def _remember(self, key_hash: bytes, found: Holder | None) -> None:
        self._known.pop(key_hash, None)
        self._unknown.pop(key_hash, None)
        memory = self._known if found is not None else self._unknown
        if len(memory) >= self._cache_size:
            del memory[next(iter(memory))]
        memory[key_hash] = _Remembered(found, self._now())
