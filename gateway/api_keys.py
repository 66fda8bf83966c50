"""API keys of services: looked up by hash in PostgreSQL, believed for a minute, and longer while PostgreSQL is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

import asyncpg
import msgspec
import structlog

from engine import metrics
from gateway.key_table import hash_of
from gateway.limits import API_KEY_CACHE, API_KEY_QUERY_SECONDS, API_KEY_SECONDS, TOKEN_BYTES

_log = structlog.get_logger("seamark.api_keys")

EVENTS_WRITE: Final = "events:write"
"""The scope of a key that may publish events."""

SCOPES: Final = (EVENTS_WRITE,)
"""All there are."""

POOL_CONNECTIONS = 4
"""A process asks for each key once a minute: few are enough."""


class ApiKey(msgspec.Struct, frozen=True):
    """What a key allows: everything it does is done for `tenant`."""

    tenant: str
    scopes: frozenset[str]


class KeysAway(Exception):
    """PostgreSQL does not answer and the key is not remembered."""


class Store(Protocol):
    """Where keys are kept."""

    async def find(self, key_hash: bytes) -> ApiKey | None:
        """The key with this SHA-256, or None."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class PostgresKeys:
    """The table `api_keys`. Connects when first needed, so that a gateway starts without PostgreSQL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._lock = asyncio.Lock()

    async def find(self, key_hash: bytes) -> ApiKey | None:
        """The key with this SHA-256 unless it was revoked or has expired.

        Raises:
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError: PostgreSQL does not answer.
        """
        pool = await self._connected()
        row = await pool.fetchrow(
            "SELECT tenant, scopes FROM api_keys WHERE key_hash = $1 AND revoked_at IS NULL"
            " AND (expires_at IS NULL OR expires_at > now())",
            key_hash,
            timeout=API_KEY_QUERY_SECONDS,
        )
        return ApiKey(row["tenant"], frozenset(row["scopes"])) if row is not None else None

    async def _connected(self) -> asyncpg.Pool[asyncpg.Record]:
        async with self._lock:
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    self._url, min_size=0, max_size=POOL_CONNECTIONS, timeout=API_KEY_QUERY_SECONDS
                )
            return self._pool

    async def close(self) -> None:
        """Close the connections, whatever they are at."""
        if self._pool is not None:
            self._pool.terminate()


class ApiKeys:
    """Keys with what they were found to allow, known and unknown ones alike.

    Args:
        store: where keys are kept.
        now: monotonic clock in seconds.
    """

    def __init__(
        self, store: Store, *, now: Callable[[], float] = time.monotonic, cache_size: int = API_KEY_CACHE
    ) -> None:
        self._store = store
        self._now = now
        self._cache_size = cache_size
        self._cache: dict[bytes, tuple[ApiKey | None, float]] = {}
        # Apart: whoever tries thousands of keys must not push those out that services use.
        self._unknown: dict[bytes, tuple[ApiKey | None, float]] = {}
        self._asking: dict[bytes, asyncio.Task[ApiKey | None]] = {}

    async def find(self, key: str) -> ApiKey | None:
        """What `key` allows; None: there is no such key.

        Raises:
            KeysAway: PostgreSQL does not answer and nothing is remembered of this key.
        """
        if not 1 <= len(key) <= TOKEN_BYTES:
            return None
        key_hash = hash_of(key)
        remembered = self._remembered(key_hash)
        if remembered is not None and self._now() < remembered[1]:
            metrics.gateway_api_keys.labels("cached").inc()
            return remembered[0]
        task = self._asking.get(key_hash)
        if task is None:
            task = self._asking[key_hash] = asyncio.create_task(self._ask(key_hash), name="api-key")
            task.add_done_callback(lambda done: self._asked(key_hash, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Give up look-ups under way and close the store."""
        for task in list(self._asking.values()):
            task.cancel()
        await self._store.close()

    def _asked(self, key_hash: bytes, task: asyncio.Task[ApiKey | None]) -> None:
        del self._asking[key_hash]
        if not task.cancelled():
            task.exception()  # told to those who wait, if any still do

    async def _ask(self, key_hash: bytes) -> ApiKey | None:
        try:
            async with asyncio.timeout(API_KEY_QUERY_SECONDS):
                found = await self._store.find(key_hash)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            remembered = self._remembered(key_hash)
            _log.warning("api_keys_away", error=type(error).__name__, outlived=remembered is not None)
            if remembered is None:
                metrics.gateway_api_keys.labels("failed").inc()
                raise KeysAway("API keys cannot be checked at the moment") from error
            metrics.gateway_api_keys.labels("outlived").inc()
            self._remember(key_hash, remembered[0])
            return remembered[0]
        metrics.gateway_api_keys.labels("queried").inc()
        self._remember(key_hash, found)
        return found

    def _remembered(self, key_hash: bytes) -> tuple[ApiKey | None, float] | None:
        return self._cache.get(key_hash) or self._unknown.get(key_hash)

    def _remember(self, key_hash: bytes, found: ApiKey | None) -> None:
        self._cache.pop(key_hash, None)
        self._unknown.pop(key_hash, None)
        memory = self._cache if found is not None else self._unknown
        if len(memory) >= self._cache_size:
            del memory[next(iter(memory))]
        memory[key_hash] = (found, self._now() + API_KEY_SECONDS)
