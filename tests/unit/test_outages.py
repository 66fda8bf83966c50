"""An outage is waited for; a fault is not. So each failure of a store must be told for what it is."""

import asyncio
from types import SimpleNamespace

import asyncpg
import pytest
from redis import exceptions as redis

from engine import patience
from engine.errors import StoreBroken, StoreUnavailable
from engine.outages import postgres_failure, redis_failure


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.CannotConnectNowError("the database system is starting up"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        asyncpg.TooManyConnectionsError("sorry, too many clients already"),
        asyncpg.DiskFullError("No space left on device"),
        asyncpg.DeadlockDetectedError("deadlock detected"),
        asyncpg.QueryCanceledError("canceling statement due to statement timeout"),
        asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT in a read-only transaction"),
        asyncpg.InterfaceError("cannot perform operation: connection is closed"),
        RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_passes_by_itself_in_postgres_is_an_outage(error):
    assert not isinstance(postgres_failure(error), StoreBroken)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("dictionary changed size during iteration"),
        asyncpg.UniqueViolationError("duplicate key value violates unique constraint"),
        asyncpg.CheckViolationError("violates check constraint"),
        asyncpg.UndefinedTableError('relation "inbox_1" does not exist'),
        asyncpg.InsufficientPrivilegeError("permission denied for table inbox"),
        asyncpg.InvalidPasswordError("password authentication failed"),
        asyncpg.PostgresSyntaxError("syntax error"),
        asyncpg.InternalServerError("unexpected chunk number"),
        asyncpg.DataError("invalid input for query argument $1: 'connection is closed'"),
        asyncpg.InterfaceError("cannot perform operation: another operation is in progress"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_of_postgres_is_not_taken_for_an_outage(error):
    assert isinstance(postgres_failure(error), StoreBroken)


def test_an_error_repeats_nothing_that_a_person_wrote():
    for error in (
        asyncpg.PostgresError.new({"C": "23505", "M": "duplicate key", "D": "Key (user_id)=(alice) already exists."}),
        asyncpg.DataError("invalid input for query argument $1: 'alice'"),
    ):
        assert "alice" not in str(postgres_failure(error))


def test_an_outage_of_redis_is_told_from_a_fault():
    away = [redis.ConnectionError(), redis.BusyLoadingError(), redis.ReadOnlyError(), redis.ResponseError("BUSY a script"),
            redis.OutOfMemoryError(), OSError(), TimeoutError(), RuntimeError("…; the handler is closed")]  # fmt: skip
    broken = [redis.AuthenticationError(), redis.NoPermissionError(), redis.ResponseError("WRONGTYPE Operation against a key"),
              redis.ResponseError("user_script:1: attempt to call a nil value"), RuntimeError("no connection")]  # fmt: skip
    assert [isinstance(redis_failure(error), StoreBroken) for error in away] == [False] * len(away)
    assert [isinstance(redis_failure(error), StoreBroken) for error in broken] == [True] * len(broken)


async def test_a_fault_of_a_store_is_not_waited_for():
    asked = []

    async def ask():
        asked.append(1)
        raise StoreBroken("PostgreSQL: a constraint")

    with pytest.raises(StoreBroken):
        await asyncio.wait_for(patience.patiently(ask), 30.0)
    assert len(asked) == 1


async def test_what_worked_for_longer_than_an_outage_may_last_is_tried_again_when_it_fails(monkeypatch):
    asked = []
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: len(asked) * 2 * patience.PATIENCE_SECONDS))

    async def ask():
        asked.append(1)
        if len(asked) == 1:
            raise StoreUnavailable("PostgreSQL: the server was restarted")
        return "done"

    assert await patience.patiently(ask) == "done"
