"""Which failures of a store pass by themselves. Every other failure is a fault of ours or of an operator, and stops the work."""

from __future__ import annotations

from typing import Final

import asyncpg
from redis import exceptions as redis

from engine.errors import StoreBroken, StoreUnavailable

_POSTGRES_PASSING: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,  # 08: the connection was lost, or refused for now
    asyncpg.InsufficientResourcesError,  # 53: too many connections, out of memory, disk full
    asyncpg.OperatorInterventionError,  # 57: shutting down, starting up, cancelled by a time-out
    asyncpg.TransactionRollbackError,  # 40: a deadlock, two transactions at once
    asyncpg.PostgresSystemError,  # 58: the disk did not answer
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,  # a server that was the primary a moment ago
    asyncpg.InvalidCachedStatementError,  # a migration has changed a table; the next connection knows it
    asyncpg.OutdatedSchemaCacheError,
)

_REDIS_PASSING: Final = (OSError, TimeoutError, redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError,
                         redis.OutOfMemoryError, redis.TryAgainError, redis.ClusterDownError, redis.MasterDownError)  # fmt: skip

_REDIS_PASSING_WORDS: Final = ("BUSY", "LOADING", "MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")
"""First words of answers for which redis-py has no class: a script runs, data are being loaded, the disk or a replica is away."""

REDIS_AWAY: Final = (redis.RedisError, OSError, TimeoutError, RuntimeError)
"""What the driver may raise: an outage, or a fault; `redis_failure` tells which. Of a connection that was just lost uvloop raises
a RuntimeError."""

_REFUSED: Final = (redis.AuthenticationError, redis.AuthorizationError)
"""redis-py counts them as lost connections. For us they are a wrong password, which does not pass by itself."""

_CONNECTION_LOST: Final = (
    "connection is closed",
    "handler is closed",
    "operation is cancelling",
    "released back to the pool",
)
"""Words with which a driver says that the connection was just lost: asyncpg in an InterfaceError, uvloop in a RuntimeError."""


def postgres_failure(error: BaseException) -> StoreUnavailable:
    """The error to raise for one of PostgreSQL's driver: `StoreUnavailable` if it passes by itself, else `StoreBroken`."""
    said = f"PostgreSQL: {type(error).__name__} {_said(error)}".strip()
    passes = isinstance(error, _POSTGRES_PASSING) or (
        isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | RuntimeError)
        and not isinstance(error, asyncpg.DataError)  # its text quotes the value, which may be a person's
        and any(words in str(error) for words in _CONNECTION_LOST)
    )
    return StoreUnavailable(said) if passes else StoreBroken(said, _remedy(error))


def redis_failure(error: BaseException) -> StoreUnavailable:
    """The same for Redis."""
    said = f"Redis: {type(error).__name__} {error}"[:300]
    passes = not isinstance(error, _REFUSED) and (
        isinstance(error, _REDIS_PASSING)
        or (isinstance(error, redis.ResponseError) and str(error).split(" ", 1)[0] in _REDIS_PASSING_WORDS)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _CONNECTION_LOST))
    )
    return StoreUnavailable(said) if passes else StoreBroken(said)


def _said(error: BaseException) -> str:
    """The error in one line, without values of rows, which may be personal data."""
    if isinstance(error, asyncpg.DataError):
        return "a value does not fit its column"
    if isinstance(error, asyncpg.PostgresError):
        return str(error.args[0] if error.args else "")[:300]  # its text goes on with the values of the row
    return " ".join(str(error).split())[:300]


def _remedy(error: BaseException) -> str:
    return (
        "Run `seamark migrate`."
        if isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError)
        else ""
    )
