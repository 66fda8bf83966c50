"""Leaving in stages, each with a deadline: tell every session when to come back, close, finish what is under way."""

from __future__ import annotations

import asyncio
import random
import time

import structlog

from engine.limits import SCAN_FEEDS_PER_TURN
from gateway.context import Context
from gateway.limits import DRAIN_SPREAD_MS, DRAIN_WORK_SECONDS

_log = structlog.get_logger("seamark.drain")


async def drain(context: Context) -> None:
    """Take no more, say `bye` to all sessions and close them with 1012; then wait for their read records and receipts.

    Clients come back spread over some seconds (`retry_after_ms`, jittered), so that the next process is not stormed.
    """
    began = time.monotonic()
    context.draining = True
    sessions = context.sessions.everyone()
    for index, session in enumerate(sessions):
        session.bye(random.randint(100, DRAIN_SPREAD_MS))
        if index % SCAN_FEEDS_PER_TURN == SCAN_FEEDS_PER_TURN - 1:
            await asyncio.sleep(0)
    under_way = set(context.tasks)
    if under_way:
        _, late = await asyncio.wait(under_way, timeout=DRAIN_WORK_SECONDS)
        for task in late:
            task.cancel()
        if late:
            _log.error("work_given_up", tasks=len(late))
    await context.receipts.close(DRAIN_WORK_SECONDS)
    _log.info("drained", sessions=len(sessions), seconds=round(time.monotonic() - began, 3))
