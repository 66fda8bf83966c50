"""Take-overs, zombies, lost answers, changing preferences, by the hundred: what is shown is the plan of whoever could commit it.

SEAMARK_WORLDS=10000 runs so many.
"""

import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from engine.broker.jetstream import Outgoing
from engine.partition.reader import Delivered
from engine.plan.decisions import Inputs
from engine.planner import deciding, plans, worker
from engine.planner.deciding import Decider, Planned
from engine.planner.forms import Form, Moment, moment_of
from engine.planner.jobs import Following
from engine.planner.plans import Found
from engine.planner.worker import PlanWorker
from tests.support.plansim import SimWitnesses, World, simulated

WORLDS = int(os.environ.get("SEAMARK_WORLDS") or 150)
MUTANT_WORLDS = 1000

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    with simulated(monkeypatch) as run:
        yield run


def judged(run: Run, seeds: Iterable[int]) -> tuple[dict[int, list[str]], list[World]]:
    """The faults of these worlds, up to the first that has some."""
    worlds = []
    for seed in seeds:
        worlds.append(World(seed))
        run(worlds[-1].run())
        if faults := worlds[-1].faults():
            return {seed: faults}, worlds
    return {}, worlds


@pytest.mark.timeout(180 + WORLDS / 10)
def test_whatever_is_lost_late_or_doubled_the_plan_shown_is_that_of_the_planner_that_moved_the_mark(run: Run) -> None:
    faults, worlds = judged(run, range(WORLDS))
    assert faults == {}
    assert sum(world.refused for world in worlds) > WORLDS, "they are wild enough"
    stored, shown = (sum(number(world) for world in worlds) for number in (stored_in, shown_in))
    assert stored - shown > WORLDS, "losers have spoken, too"


def stored_in(world: World) -> int:
    return len(world.broker.receipts.stored)


def shown_in(world: World) -> int:
    return len(world.shown())


settle_round, move, look = PlanWorker._settle_round, PlanWorker._move, PlanWorker._look
receipt_of, inputs_of, filled = plans.receipt_of, Decider._inputs, Form.filled


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


async def noted(self: PlanWorker, round_: Sequence[Delivered]) -> Planned:
    planned = await decide(self, round_)
    self._receipts_due = bool(planned.receipts)  # type: ignore[attr-defined]
    return planned


async def jobs_after_the_mark(self: PlanWorker, jobs: Sequence[Outgoing] = ()) -> None:
    """As if the position were stored first, and the jobs after it."""
    await move(self)
    if jobs:
        await move(self, jobs)


async def jobs_before_the_mark(self: PlanWorker, jobs: Sequence[Outgoing] = ()) -> None:
    """As if the jobs were stored under the mark before, and only then the position."""
    passed, writer = self._passed, self._writer
    if jobs and writer is not None:
        self._passed = writer.mark.seq
        await move(self, jobs)
        self._passed = passed
    await move(self)


async def passed_over(self: PlanWorker, one: Following, reached: int) -> None:
    """As if what JOBS takes never were left out without a word."""
    self._passed = reached


async def not_buried(*_: Any) -> None:
    """As if what a tenant has too much of were left out without a letter."""


def without_term(*args: Any, **options: Any) -> Outgoing | None:
    due, inputs, decisions, _ = args
    return receipt_of(due, inputs, decisions, 100, **options)


def only_what_goes_further(*args: Any, always: bool) -> Outgoing | None:
    return receipt_of(*args, always=False)


def at_last(self: Decider, *args: Any, **said: Any) -> Inputs:
    """As if a decision were said to be of the moment in which it is written, not of that in which it was begun."""
    return replace(inputs_of(self, *args, **said), now=worker.datetime.now(None))  # type: ignore[arg-type]


def filled_at_last(self: Form, found: Found, user: str, _: Moment) -> Any:
    return filled(self, found, user, moment_of(worker.datetime.now(None)))  # type: ignore[arg-type]


async def none(self: SimWitnesses, _: int) -> None:
    await self.world.ask_store()


async def from_the_end(self: PlanWorker) -> Any:
    found, mark, log, witness = await look(self)
    return found, replace(mark, seq=log.last_seq), log, witness


def unguarded(*args: Any) -> bytes:
    return b"Nats-Rollup:sub\r\n"


MISTAKES: dict[str, list[tuple[Any, str, Any]]] = {
    "mark before receipts": [(PlanWorker, "_settle_round", mark_first)],
    "receipts without term": [(deciding, "receipt_of", without_term)],
    "silence where an earlier planner may have spoken": [(deciding, "receipt_of", only_what_goes_further)],
    "receipts far beyond the mark": [(PlanWorker, "_move", mark_moved_by_rounds_only), (PlanWorker, "_decide", noted)],
    "a preference read before the time that the decision says": [
        (Decider, "_inputs", at_last),
        (Form, "filled", filled_at_last),
    ],
    "a form that outlives a change of rules and preferences": [(deciding, "id", lambda _: 0)],
    "JOBS that were put back are believed": [(SimWitnesses, "of", none)],
    "a take-over goes on from the end of the log": [(PlanWorker, "_look", from_the_end)],
    "jobs that follow their mark": [(PlanWorker, "_move", jobs_after_the_mark)],
    "jobs that go before their mark": [(PlanWorker, "_move", jobs_before_the_mark)],
    "jobs that JOBS takes never are left out": [(PlanWorker, "_give_up", passed_over)],
    "jobs that are too many have no letter": [(worker, "bury", not_buried)],
    "a mark that expects nothing": [(worker.position.MarkedStream, "lines", unguarded)],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_in_the_protocol_is_noticed(mistake: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlanWorker, "_receipts_due", False, raising=False)
    for target, name, wrong in MISTAKES[mistake]:
        monkeypatch.setattr(target, name, wrong, raising=name != "id")  # which is no name of the module
    faults, _ = judged(run, range(MUTANT_WORLDS))
    assert faults, "no world noticed"
