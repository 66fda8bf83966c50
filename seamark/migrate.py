"""The PostgreSQL schema: forward-only revisions in plain SQL, applied by Alembic."""

from __future__ import annotations

import asyncio
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from engine.errors import Unavailable

MIGRATE_SECONDS_MAX = 120.0


async def migrate(postgres_url: str) -> None:
    """Bring the schema to the newest revision; safe to repeat and to run from several processes at once.

    Raises:
        Unavailable: PostgreSQL does not answer.
    """
    engine = create_async_engine(_with_driver(postgres_url), poolclass=NullPool)
    try:
        async with asyncio.timeout(MIGRATE_SECONDS_MAX), engine.begin() as connection:
            # Two provisioners must not run revisions side by side; released with the transaction.
            await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7345251)")
            await connection.run_sync(_upgrade)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"PostgreSQL cannot be migrated: {error}") from error
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _with_driver(url: str) -> str:
    """SQLAlchemy wants the driver's name in the scheme."""
    _, separator, rest = url.partition("://")
    return f"postgresql+asyncpg{separator}{rest}"
