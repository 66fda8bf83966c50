"""Who goes first among the sources of one process."""

import asyncio

import pytest

from engine.dispatch import turns as module
from engine.dispatch.source import BULK, EVENTS, LATER, EventSource
from engine.dispatch.turns import Turns
from engine.limits import BATCH_MESSAGES_MAX, BESIDE_MESSAGES_MAX


async def test_due_events_and_bulk_wait_for_urgent_ones_and_not_for_each_other() -> None:
    turns = Turns()
    async with asyncio.timeout(5), turns.turn(BULK), turns.turn(LATER), turns.turn(EVENTS):
        pass


async def taken(turns: Turns, done: list[str], name: str) -> None:
    async with turns.turn(BULK):
        done.append(name)


async def test_what_may_wait_goes_on_as_soon_as_nothing_urgent_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 60)
    turns, done = Turns(), []
    with turns.work(EVENTS):
        with turns.work(EVENTS):
            patient = asyncio.create_task(taken(turns, done, "bulk"))
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        done.append("urgent")
    await asyncio.wait_for(patient, 30)
    assert done == ["urgent", "bulk"]


async def test_what_may_wait_goes_on_slowly_while_urgent_work_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    turns, done = Turns(), []
    with turns.work(EVENTS):
        async with asyncio.timeout(30):
            for _ in range(3):
                await taken(turns, done, "bulk")
    assert done == ["bulk"] * 3


async def test_one_batch_of_what_may_wait_is_under_way_at_a_time_and_urgent_ones_wait_for_none() -> None:
    turns, at_once, most = Turns(), 0, 0

    async def batch() -> None:
        nonlocal at_once, most
        async with turns.turn(BULK):
            at_once, most = at_once + 1, max(most, at_once + 1)
            async with turns.turn(EVENTS):
                await asyncio.sleep(0)
            at_once -= 1

    async with asyncio.timeout(30):
        await asyncio.gather(*(batch() for _ in range(10)))
    assert most == 1


async def test_batches_of_what_may_wait_are_small_while_urgent_events_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LULL_SECONDS", 60)
    turns = Turns()
    assert turns.most(BULK) == BATCH_MESSAGES_MAX
    with turns.work(EVENTS):
        assert (turns.most(BULK), turns.most(LATER), turns.most(EVENTS)) == (
            BESIDE_MESSAGES_MAX,
            BESIDE_MESSAGES_MAX,
            BATCH_MESSAGES_MAX,
        )
    assert turns.most(BULK) == BESIDE_MESSAGES_MAX  # the next one is expected
    monkeypatch.setattr(module, "LULL_SECONDS", 0)
    assert turns.most(BULK) == BATCH_MESSAGES_MAX


async def test_a_turn_that_is_cancelled_while_it_waits_keeps_nobody_from_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 60)
    turns, done = Turns(), []
    with turns.work(EVENTS):
        waiting = asyncio.create_task(taken(turns, done, "cancelled"))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.wait_for(taken(turns, done, "next"), 30)
    assert done == ["next"]


class Clock:
    """Time that passes only while somebody sleeps, or works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, sleep = 1000.0, asyncio.sleep

        async def pass_time(seconds: float) -> None:
            self.now += seconds
            await sleep(0)

        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.asyncio, "sleep", pass_time)


@pytest.mark.parametrize(
    ("source", "urgent", "seconds"), [(BULK, True, 0.04), (BULK, False, 0.01), (LATER, True, 0.01)]
)
async def test_bulk_is_at_work_for_a_quarter_of_the_time_while_urgent_events_come(
    source: EventSource, urgent: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns()
    if urgent:
        with turns.work(EVENTS):
            pass
    clock = Clock(monkeypatch)
    if urgent:
        monkeypatch.setattr(turns._urgent, "_ended_at", clock.now)
    for _ in range(5):
        async with turns.turn(source):
            clock.now += 0.01
    assert clock.now == pytest.approx(1000 + 4 * seconds + 0.01)


async def test_a_batch_that_took_long_is_followed_by_a_short_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, clock = Turns(), Clock(monkeypatch)
    for _ in range(2):
        with turns.work(EVENTS):
            pass
        async with turns.turn(BULK):
            clock.now += 30
            with turns.work(EVENTS):
                pass
    assert clock.now == pytest.approx(1060 + module.PAUSE_SECONDS_MAX)
