"""Waiting with a deadline: for what another process does, in tests without a loop, and for the end of a task."""

import asyncio
import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def wait_for(
    look: Callable[[], T],
    *,
    seconds: float = 40.0,
    every_seconds: float = 0.02,
    said: Callable[[], object] = lambda: "",
) -> T:
    """Poll until `look()` is true; its value.

    Args:
        look: may fail by an assertion of its own where waiting has become vain.
        said: what the process that is waited for has printed; shown when the time is over.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {said()}"
        time.sleep(every_seconds)
    return found


async def ended(task: asyncio.Task[Any], *, seconds: float = 30.0) -> None:
    """Cancel a task and wait for its end, however it ends. One that hangs fails the test, and not the whole run."""
    task.cancel()
    await asyncio.wait((task,), timeout=seconds)
    if not task.done():
        where = io.StringIO()
        task.print_stack(file=where)
        raise AssertionError(f"{task.get_name()} has not ended within {seconds:g} s: {where.getvalue()}")
    if not task.cancelled():
        task.exception()  # is for whoever waited for its result
