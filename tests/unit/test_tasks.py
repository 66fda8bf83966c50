"""A loop that runs for ever ends when it is told to, though a library swallowed that."""

import asyncio
import contextlib

import pytest

from engine.tasks import end_if_cancelled


async def test_a_swallowed_cancellation_ends_the_task_at_its_next_turn() -> None:
    turns = 0

    async def run() -> None:
        nonlocal turns
        while True:
            end_if_cancelled()
            turns += 1
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

    task = asyncio.create_task(run(), name="run")
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)
    assert turns == 1


async def test_a_deadline_that_has_passed_is_no_cancellation() -> None:
    for _ in range(3):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.sleep(1)
        end_if_cancelled()
