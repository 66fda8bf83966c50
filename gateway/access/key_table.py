"""The table of API keys as operators see it: keys are made, listed and revoked; the keys themselves are in no table."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec

KEY_PREFIX: Final = "sk_"
"""Lets scanners of repositories tell a key from any other random text."""

KEY_BYTES: Final = 32
QUERY_SECONDS: Final = 10.0

_CREATE: Final = """
INSERT INTO api_keys (tenant, name, key_hash, scopes, expires_at) VALUES ($1, $2, $3, $4, $5)
RETURNING id, tenant, name, scopes, created_at, expires_at, revoked_at
"""

_KEEP: Final = """
INSERT INTO api_keys (tenant, name, key_hash, scopes) VALUES ($1, $2, $3, $4)
ON CONFLICT (key_hash) DO UPDATE SET scopes = excluded.scopes
"""

_ALL: Final = """
SELECT id, tenant, name, scopes, created_at, expires_at, revoked_at
FROM api_keys WHERE $1::text IS NULL OR tenant = $1 ORDER BY id
"""

_REVOKE: Final = """
UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1
RETURNING id, tenant, name, scopes, created_at, expires_at, revoked_at
"""


class StoredKey(msgspec.Struct, frozen=True):
    """What is known of a key; one that has expired or was revoked stays in the table, so that its use can be explained.

    An operator's has no `tenant`.
    """

    id: int
    tenant: str | None
    name: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class Created(NamedTuple):
    """A new key: the only time that `key` is known."""

    key: str
    stored: StoredKey


class KeyTable:
    """The table `api_keys` over a connection of the caller's.

    Every method raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError where PostgreSQL does not do
    what is asked.
    """

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection

    async def create(
        self, tenant: str | None, scopes: Sequence[str], *, name: str = "", expires_at: datetime | None = None
    ) -> Created:
        """Make a key that allows `scopes` for `tenant`, or one of an operator (None), and keep its hash."""
        key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        [row] = await self._ask(_CREATE, tenant, name, hash_of(key), list(scopes), expires_at)
        return Created(key, row)

    async def keep(self, key: str, tenant: str, scopes: Sequence[str], *, name: str) -> None:
        """Let a key of the caller's allow `scopes` for `tenant`, whether it is there already or not; a revoked one stays so."""
        await self._ask(_KEEP, tenant, name, hash_of(key), list(scopes))

    async def all(self, tenant: str | None = None) -> list[StoredKey]:
        """All keys ever made (of a tenant), oldest first."""
        return await self._ask(_ALL, tenant)

    async def revoke(self, id: int) -> StoredKey | None:
        """End a key; None: there is none of this id. Gateways notice within `API_KEY_SECONDS`. Twice is harmless."""
        found = await self._ask(_REVOKE, id)
        return found[0] if found else None

    async def _ask(self, statement: str, *values: Any) -> list[StoredKey]:
        rows = await self._connection.fetch(statement, *values, timeout=QUERY_SECONDS)
        return [StoredKey(**dict(row)) for row in rows]


def hash_of(key: str) -> bytes:
    """What the table keeps of a key: its SHA-256. A key is random enough that it needs no salt."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
