"""The PostgreSQL schema: forward-only revisions in plain SQL, applied by Alembic."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from engine.errors import InvalidSetting, Unavailable
from ops.postgres import connect, explained

MIGRATE_SECONDS_MAX = 120.0


class Migrated(NamedTuple):
    """Revisions of the schema: the one that was found, None for an empty database, and the one that is there now."""

    before: str | None
    after: str


async def migrate(postgres_url: str) -> Migrated:
    """Bring the schema to the newest revision; safe to repeat and to run from several processes at once.

    Raises:
        InvalidSetting: PostgreSQL does not let us in, or its schema is of a newer version; the message has the remedy.
        Unavailable: PostgreSQL does not answer.
    """
    # The driver reads the address itself: between the two, `sslmode` and several hosts would be lost.
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: connect(postgres_url), poolclass=NullPool
    )
    try:
        async with asyncio.timeout(MIGRATE_SECONDS_MAX), engine.begin() as connection:
            # Two provisioners must not run revisions side by side; released with the transaction.
            await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7345251)")
            return await connection.run_sync(_upgrade)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"PostgreSQL cannot be migrated: {str(error) or type(error).__name__}") from error
    except SQLAlchemyError as error:
        raise explained(error) from error
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> Migrated:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    before = MigrationContext.configure(connection).get_current_revision()
    if before is not None and before not in revisions:
        raise InvalidSetting(
            f"the schema is at revision {before}, the newest that this version of Seamark knows is {revisions[0]}:"
            " run a newer version"
        )
    command.upgrade(config, "head")
    return Migrated(before, revisions[0])
