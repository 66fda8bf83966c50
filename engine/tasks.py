"""Tasks that run for ever must end when they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def end_if_cancelled() -> None:
    """Raises CancelledError in a task whose cancellation a library has swallowed (redis-py does, in the midst of a call).

    Loops that run for ever call it once a turn; without it a process would not end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def run_until(stop: asyncio.Event, work: Coroutine[Any, Any, None], name: str) -> None:
    """Run `work` until it ends, `stop` is set or the caller is cancelled; it has ended when this returns.

    Raises:
        whatever `work` raises, be it while it is being ended.
    """
    working = asyncio.create_task(work, name=name)
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
    if not working.cancelled():
        working.result()
