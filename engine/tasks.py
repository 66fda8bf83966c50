"""Tasks and loops that run for ever, and end when they are told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any


def end_if_cancelled() -> None:
    """Raises CancelledError in a task whose cancellation a library has swallowed (redis-py does, in the midst of a call).

    Loops that run for ever call it once a turn; without it a process would not end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def set_or_after(event: asyncio.Event, seconds: float) -> None:
    """Return when `event` is set, or else after so many seconds; `event` is clear then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()


@contextlib.asynccontextmanager
async def patiently_within(seconds: float, looks: int = 10) -> AsyncIterator[None]:
    """As `asyncio.timeout`, but a loop that was busy first reads what came in time: it calls timers before it looks at sockets.

    Args:
        looks: turns of the loop that pass at least before the time is over.

    Raises:
        TimeoutError: in the block, when it is.
    """
    async with asyncio.timeout(None) as bound:
        looking = asyncio.create_task(_look(bound, seconds, looks), name="patience")
        try:
            yield
        finally:
            looking.cancel()


async def _look(bound: asyncio.Timeout, seconds: float, looks: int) -> None:
    for _ in range(looks):
        await asyncio.sleep(seconds / looks)
    bound.reschedule(asyncio.get_running_loop().time())


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel these tasks, as far as they were ever begun, and return when they have ended."""
    begun = [task for task in tasks if task is not None]
    for task in begun:
        task.cancel()
    await asyncio.gather(*begun, return_exceptions=True)


async def together(works: Mapping[str, Coroutine[Any, Any, None]]) -> None:
    """Do all of these at once, each as a task of this name; the first failure ends the others, and is raised."""
    # No TaskGroup: one that is cancelled while a task of it fails raises the failure alone, and the end would be missed.
    tasks = [asyncio.create_task(work, name=name) for name, work in works.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await end(*tasks)
    for task in done:
        await task


class Tasks(set[asyncio.Task[None]]):
    """Tasks under way, of one owner; each leaves when it has ended."""

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` as one of them."""
        task = asyncio.create_task(work, name=name)
        self.add(task)
        task.add_done_callback(self.discard)
        return task

    async def end(self) -> None:
        """Cancel what is under way, and return when it has ended."""
        await end(*self)


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
            await end(working)
    if not working.cancelled():
        working.result()
