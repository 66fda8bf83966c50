"""What opened and closed a provider's breaker stands in `control_log`, where operators look for what has stopped a channel."""

import asyncio
import contextlib

import pytest

from engine.channels.channel import Outcome
from engine.controls.log import Row, last
from engine.jobs.breaker import IN_A_ROW
from engine.postgres import Pool, asking
from engine.worker import breakerlog
from engine.worker.breakerlog import BreakerLog
from engine.worker.gate import Gate
from tests.support.logs import eventually

DOWN = Outcome(kind="transient", provider="relay", code="421")


async def test_a_breaker_that_opens_and_closes_is_written_down_with_its_reason_and_one_of_an_endpoint_is_not(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breakerlog, "PAUSE_SECONDS", 0.05)
    log = BreakerLog(pool)
    relay, endpoint = Gate("relay", noted=log.note), Gate("webhook", "acme/wh_1", noted=log.note)

    async def rows(count: int) -> list[Row] | None:
        async with asking(pool, 20) as connection:
            found = await last(connection, 10)
        return found if len(found) >= count else None

    task = asyncio.create_task(log.run(), name="breaker-log")
    try:
        for _ in range(IN_A_ROW):
            for gate in (relay, endpoint):
                await gate.told(DOWN, retry=False)
        [opened] = await eventually(lambda: rows(1))
        assert (opened.action, opened.why) == ("breaker open", "421")
        assert opened.after is not None
        assert b"relay" in bytes(opened.after)
        await relay.told(Outcome(kind="ok"), retry=False)
        closed, first = await eventually(lambda: rows(2))
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert (closed.action, first) == ("breaker closed", opened)
    assert closed.at >= first.at
