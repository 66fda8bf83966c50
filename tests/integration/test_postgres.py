"""A transaction is stored whole or not at all, within a deadline, and keeps its connection where nothing is wrong with it."""

import asyncpg
import pytest

from engine.errors import InvalidSetting, StoreBroken, StoreUnavailable
from engine.postgres import Pool, asking, lazy_pool, transaction

INSERT = "INSERT INTO retention (tenant, days) VALUES ('acme', 5)"
COUNT = "SELECT count(*) FROM retention WHERE tenant = 'acme'"


async def insert(pool: Pool, *, times: int = 1, then: Exception | None = None, seconds: float = 5.0) -> None:
    async with transaction(pool, seconds) as connection:
        for _ in range(times):
            await connection.execute(INSERT)
        if then is not None:
            raise then


async def test_what_the_block_did_is_stored_when_it_ends(pool: Pool) -> None:
    async with transaction(pool) as connection:
        await connection.execute(INSERT)
        assert await pool.fetchval(COUNT) == 0
    assert await pool.fetchval(COUNT) == 1


async def test_an_error_of_ours_takes_everything_back_and_keeps_the_connection(pool: Pool) -> None:
    async with transaction(pool) as connection:
        backend = await connection.fetchval("SELECT pg_backend_pid()")
    with pytest.raises(InvalidSetting, match="no"):
        await insert(pool, then=InvalidSetting("no"))
    async with transaction(pool) as connection:
        assert await connection.fetchval("SELECT pg_backend_pid()") == backend
        assert await connection.fetchval(COUNT) == 0


async def test_a_fault_takes_everything_back_and_is_told_from_an_outage(pool: Pool) -> None:
    with pytest.raises(StoreBroken):
        await insert(pool, times=2)
    assert await pool.fetchval(COUNT) == 0


async def test_a_silent_server_is_left_at_the_deadline(pool: Pool, postgres: str) -> None:
    holder = await asyncpg.connect(postgres)
    try:
        await holder.execute("BEGIN; LOCK TABLE retention IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnavailable):
            await insert(pool, seconds=0.2)
    finally:
        await holder.close()
    assert await pool.fetchval(COUNT) == 0


async def test_a_question_is_one_way_there_and_back(pool: Pool, postgres: str) -> None:
    lazy = await lazy_pool(postgres, 1, connect_seconds=5)
    try:
        async with asking(lazy) as connection:
            backend = await connection.fetchval("SELECT pg_backend_pid()")
        said = await pool.fetchval("SELECT query FROM pg_stat_activity WHERE pid = $1", backend)
    finally:
        await lazy.close()
    assert said == "SELECT pg_backend_pid()", "nothing else was asked when the connection was given back"
