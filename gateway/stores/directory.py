"""The directory as a gateway asks it: connections of its own, so that nothing asked of it keeps devices and API keys waiting."""

from __future__ import annotations

import asyncpg

from engine.postgres import Pool
from gateway.limits import DIRECTORY_CONNECTIONS
from gateway.stores.tables import CONNECT_SECONDS


async def open_directory(url: str) -> Pool:
    """Connections to the database at `url`, made when first needed, so that a gateway starts without PostgreSQL."""
    pool = asyncpg.create_pool(url, min_size=0, max_size=DIRECTORY_CONNECTIONS, timeout=CONNECT_SECONDS)
    await pool
    return pool
