"""Tasks that run for ever must end when they are told to."""

from __future__ import annotations

import asyncio


def end_if_cancelled() -> None:
    """Raises CancelledError in a task whose cancellation a library has swallowed (redis-py does, in the midst of a call).

    Loops that run for ever call it once a turn; without it a process would not end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
