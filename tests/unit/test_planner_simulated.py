"""Take-overs, zombies, lost answers and changing rules by the hundred: what is shown is the plan of whoever could commit it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from engine.broker.jetstream import Outgoing
from engine.partition.reader import Delivered
from engine.planner import plans, worker
from engine.planner.worker import PlanWorker
from tests.support.plansim import World

WORLDS = 150


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a few records; and no time passes between attempts."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def at_once(seconds: float) -> None:
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", at_once)
    monkeypatch.setattr(worker, "PLAN_ROUND", 4)


async def violations(seeds: range) -> dict[int, list[str]]:
    found = {}
    for seed in seeds:
        world = World(seed)
        await asyncio.wait_for(world.run(), 20)
        if faults := world.faults():
            found[seed] = faults
    return found


@pytest.mark.timeout(120)
async def test_whatever_is_lost_late_or_doubled_the_plan_shown_is_that_of_the_planner_that_moved_the_mark() -> None:
    assert await violations(range(WORLDS)) == {}


async def test_the_simulated_worlds_are_wild_enough() -> None:
    refused, plans_of_losers = 0, 0
    for seed in range(20):
        world = World(seed)
        await world.run()
        refused += world.refused
        plans_of_losers += len(world.broker.receipts.stored) - len(world.shown().plans)
    assert refused > 50
    assert plans_of_losers > 50


settle_round, move, receipt_of = PlanWorker._settle_round, PlanWorker._move, plans.receipt_of


async def mark_first(self: PlanWorker, round_: Sequence[Delivered]) -> None:
    self._passed = round_[-1].seq
    await move(self)
    await settle_round(self, round_)


async def mark_moved_by_rounds_only(self: PlanWorker, jobs: Sequence[Outgoing] = ()) -> None:
    """As if the mark were not brought up to the round before its receipts are stored."""
    if self._receipts_due:  # type: ignore[attr-defined]
        self._receipts_due = False  # type: ignore[attr-defined]
        return
    await move(self, jobs)


decide = PlanWorker._decide


async def noted(self: PlanWorker, round_: Sequence[Delivered]) -> list[Outgoing]:
    receipts = await decide(self, round_)
    self._receipts_due = bool(receipts)  # type: ignore[attr-defined]
    return receipts


def without_term(*args: Any, **options: Any) -> Outgoing | None:
    due, inputs, decisions, _ = args
    return receipt_of(due, inputs, decisions, 100, **options)


def only_what_goes_further(*args: Any, always: bool) -> Outgoing | None:
    return receipt_of(*args, always=False)


MISTAKES: dict[str, list[tuple[Any, str, Any]]] = {
    "mark before receipts": [(PlanWorker, "_settle_round", mark_first)],
    "receipts without term": [(worker, "receipt_of", without_term)],
    "silence where an earlier planner may have spoken": [(worker, "receipt_of", only_what_goes_further)],
    "receipts far beyond the mark": [(PlanWorker, "_move", mark_moved_by_rounds_only), (PlanWorker, "_decide", noted)],
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.timeout(120)
async def test_every_mistake_in_the_protocol_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlanWorker, "_receipts_due", False, raising=False)
    for target, name, wrong in MISTAKES[mistake]:
        monkeypatch.setattr(target, name, wrong)
    for start in range(0, WORLDS * 4, 20):
        if await violations(range(start, start + 20)):
            return
    pytest.fail("no world noticed")
