"""A loop that runs for ever ends when it is told to, though a library swallowed that."""

import asyncio
import contextlib

import pytest

from engine.tasks import Tasks, end_if_cancelled, run_until, set_or_after


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
        await asyncio.wait_for(task, 20)
    assert turns == 1


async def test_a_deadline_that_has_passed_is_no_cancellation() -> None:
    for _ in range(3):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.sleep(1)
        end_if_cancelled()


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_work_has_ended_in_good_order_when_it_was_stopped_or_its_caller_was_cancelled(how: str) -> None:
    stop, begun, ended = asyncio.Event(), asyncio.Event(), False

    async def work() -> None:
        nonlocal ended
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended = True

    caller = asyncio.create_task(run_until(stop, work(), name="work"), name="caller")
    await begun.wait()
    if how == "stop":
        stop.set()
        await asyncio.wait_for(caller, 20)
    else:
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(caller, 20)
    assert ended
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() in ("work", "stop")] == []


async def test_what_work_raises_reaches_the_caller_even_while_it_is_being_ended() -> None:
    async def fails(at_once: bool) -> None:
        try:
            await asyncio.sleep(0 if at_once else 3600)
        finally:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_until(asyncio.Event(), fails(at_once=True), name="work")
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, stop.set)
    with pytest.raises(ValueError, match="broken"):
        await run_until(stop, fails(at_once=False), name="work")


async def test_a_wait_ends_by_its_event_or_after_its_time_and_the_event_can_be_waited_for_again() -> None:
    event = asyncio.Event()
    event.set()
    async with asyncio.timeout(20):
        await set_or_after(event, 3600)
    assert not event.is_set()
    await set_or_after(event, 0.01)
    assert not event.is_set()


async def test_an_owner_that_ends_ends_its_tasks_and_an_ended_task_is_not_kept() -> None:
    tasks = Tasks()
    done = tasks.begin(asyncio.sleep(0), "short")
    waiting = tasks.begin(asyncio.sleep(3600), "long")
    await done
    assert set(tasks) == {waiting}
    await tasks.end()
    assert waiting.cancelled()
    assert not tasks
