"""PostgreSQL as commands use it: one connection, and what its refusals mean to whoever typed the command."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import asyncpg

from engine.errors import InvalidSetting, StoreUnavailable, Unavailable
from engine.postgres import Pool
from seamark.protocol.errors import SeamarkError

CONNECT_SECONDS: Final = 10.0

FAILURES: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)
"""What a question to PostgreSQL may raise, for `explained`."""

_UNDEFINED_TABLE: Final = "42P01"
_NOT_PERMITTED: Final = "42501"
_WRONG_LOGIN: Final = "28"
_WRONG_DATABASE: Final = "3D"


async def connect(url: str) -> asyncpg.Connection[asyncpg.Record]:
    """A connection to the database at `url`; the caller closes it.

    Raises:
        InvalidSetting: `url` is none, or the server does not know the user, the password or the database.
        Unavailable: no answer within 10 s.
    """
    try:
        return await asyncpg.connect(url, timeout=CONNECT_SECONDS)
    except FAILURES as error:
        raise explained(error) from error
    except ValueError as error:  # not repeated: a password with a / in it is taken for the port
        raise _not_an_address() from error


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Pool]:
    """The database at `url` for what a command does in the block, over one connection.

    Raises:
        InvalidSetting, Unavailable: as `connect`, also for failures in the block.
    """
    # Connected before the block begins: a ValueError of the block is none about the address.
    pool = asyncpg.create_pool(url, min_size=1, max_size=1, timeout=CONNECT_SECONDS)
    try:
        await pool
    except FAILURES as error:
        raise explained(error) from error
    except ValueError as error:  # see `connect`
        raise _not_an_address() from error
    try:
        yield pool
    except (*FAILURES, StoreUnavailable) as error:
        raise explained(error) from error
    finally:
        pool.terminate()


def explained(error: BaseException) -> SeamarkError:
    """The error to raise instead of what a driver raised: one line, with the remedy where somebody has to act."""
    cause = error
    while not isinstance(cause, FAILURES) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, asyncpg.exceptions.ClientConfigurationError):
        # Of an address that cannot be read the driver repeats pieces; of an option it says what is wrong with it.
        unreadable = str(cause).startswith(("invalid DSN", "invalid IPv6"))
        return _not_an_address() if unreadable else InvalidSetting(f"SEAMARK_POSTGRES_URL: {cause}")
    said = " ".join(str(cause).split()) or type(cause).__name__
    state = getattr(cause, "sqlstate", None) or ""
    if state == _UNDEFINED_TABLE:
        return InvalidSetting(f"the database lacks a table ({said}): run `seamark migrate`")
    if state == _NOT_PERMITTED or state[:2] in (_WRONG_LOGIN, _WRONG_DATABASE):
        return InvalidSetting(f"SEAMARK_POSTGRES_URL: PostgreSQL refuses: {said}")
    return Unavailable(f"PostgreSQL: {said}")


def _not_an_address() -> InvalidSetting:
    return InvalidSetting(
        "SEAMARK_POSTGRES_URL is not an address of PostgreSQL: write postgresql://user:password@host:5432/database,"
        " with %XX for what is special in the password"
    )
