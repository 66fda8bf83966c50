"""What opened and closed a provider's breaker stands in `control_log`, where operators look for what has stopped a channel."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from engine.channels.channel import Outcome
from engine.controls.log import Row, last
from engine.jobs.breaker import IN_A_ROW
from engine.postgres import Pool, asking
from engine.worker import breakerlog
from engine.worker.breakerlog import BreakerLog
from engine.worker.gate import Gate
from tests.support.logs import eventually


@contextlib.asynccontextmanager
async def at_work(log: BreakerLog) -> AsyncIterator[None]:
    task = asyncio.create_task(log.run(), name="breaker-log")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def said(pool: Pool, count: int) -> list[Row] | None:
    """The rows, newest first, once there are so many."""
    async with asking(pool, 20) as connection:
        found = await last(connection, 10)
    return found if len(found) >= count else None


DOWN = Outcome(kind="transient", provider="relay", code="421")


async def test_a_breaker_that_opens_and_closes_is_written_down_with_its_reason_and_one_of_an_endpoint_is_not(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breakerlog, "PAUSE_SECONDS", 0.05)
    log = BreakerLog(pool)
    relay, endpoint = Gate("relay", noted=log.note), Gate("webhook", "acme/wh_1", noted=log.note)

    async with at_work(log):
        for _ in range(IN_A_ROW):
            for gate in (relay, endpoint):
                await gate.told(DOWN, retry=False)
        [opened] = await eventually(lambda: said(pool, 1))
        assert (opened.action, opened.why) == ("breaker open", "421")
        assert opened.after is not None
        assert b"relay" in bytes(opened.after)
        await relay.told(Outcome(kind="ok"), retry=False)
        closed, first = await eventually(lambda: said(pool, 2))
    assert (closed.action, first) == ("breaker closed", opened)
    assert closed.at >= first.at


async def test_a_worker_that_leaves_or_dies_has_no_breaker_open_any_more(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the log would look for a provider that is down, and it has been up for weeks."""
    for name, seconds in (("PAUSE_SECONDS", 0.05), ("KEEP_SECONDS", 0.1), ("GONE_SECONDS", 1.0)):
        monkeypatch.setattr(breakerlog, name, seconds)
    leaves, dies, stays = BreakerLog(pool), BreakerLog(pool), BreakerLog(pool)
    dies._who, stays._who = "one that dies", "one that stays"
    dies.note("dies", "open", "421")
    await dies._write(dies._new)
    async with at_work(stays):
        stays.note("stays", "open", "421")
        async with at_work(leaves):
            leaves.note("leaves", "open", "421")
            await eventually(lambda: said(pool, 3))
        rows = await eventually(lambda: said(pool, 5))
        assert rows is not None
        closed = {bytes(one.after or b""): one for one in rows if one.action == "breaker closed"}
        assert sorted(closed) == [b'{"provider": "dies"}', b'{"provider": "leaves"}']
        assert [one.who for one in closed.values() if b"dies" in bytes(one.after or b"")] == ["one that dies"]
        async with asking(pool, 20) as connection:
            assert len(await last(connection, 10)) == 5, "each is ended once, and who stays is not"


async def test_a_worker_of_an_older_version_is_not_said_to_be_gone(pool: Pool) -> None:
    """It lives, and has its provider's breaker open; it only never says so again."""
    dies = BreakerLog(pool)
    async with asking(pool, 20) as connection:
        await connection.execute(
            "INSERT INTO control_log (id, number, at, who, why, action, after)"
            " VALUES ('old', 0, now() - interval '1 day', 'an older one', '421', 'breaker open', '{\"provider\": \"relay\"}')"
        )
        at = datetime.now(UTC) - timedelta(days=1)
        await connection.execute(breakerlog._WRITE, "new", at, dies._who, "421", "breaker open", "relay")
        await connection.execute(breakerlog._END_GONE, 0.0)
        rows = await last(connection, 10)
    assert [(one.action, one.who) for one in rows if one.action == "breaker closed"] == [("breaker closed", dies._who)]
    assert len(rows) == 3
