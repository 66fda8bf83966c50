"""Digests in worlds by the hundred: whatever is late, lost or killed, each record ends once, and is in one message.

SEAMARK_WORLDS=10000 runs so many.
"""

import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from engine.jobs import handling
from engine.jobs.claims import Done
from engine.jobs.handling import Handler
from tests.support.digestsim import DigestWorld, with_digests
from tests.support.jobsim import simulated

WORLDS = int(os.environ.get("SEAMARK_WORLDS") or 40)
MUTANT_WORLDS = 600

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    with with_digests(monkeypatch), simulated(monkeypatch) as run:
        yield run


def judged(run: Run, count: int) -> tuple[dict[int, list[str]], list[DigestWorld]]:
    """The faults of these worlds, up to the first that has some."""
    worlds = []
    for seed in range(count):
        worlds.append(DigestWorld(seed))
        run(worlds[-1].run())
        if faults := worlds[-1].faults():
            return {seed: faults}, worlds
    return {}, worlds


@pytest.mark.timeout(120 + WORLDS / 5)
def test_whatever_is_late_lost_or_killed_each_record_of_a_digest_ends_once_and_is_in_one_message(run: Run) -> None:
    faults, worlds = judged(run, WORLDS)
    assert faults == {}
    reasons = {one.reason for world in worlds for one in world.journal.receipts}
    ends = {one.state for world in worlds for one in world.journal.receipts}
    assert {"lease_lost", "forgotten", "all_read"} <= reasons, "the worlds are wild enough"
    assert {"sent", "failed", "suppressed", "split", "queued", "ambiguous"} <= ends
    members = [one.ids for world in worlds for _, one in world.taken]
    assert any(len(ids) > 1 for ids in members)
    assert len(set(members)) < len(members), "and some messages were sent again"


# --- mistakes --------------------------------------------------------------------------------------------------------

right_next, right_with = handling.next_round, handling.with_members


def nothing_is_left(job: Any, done: Done, now: Any, *, fresh: bool) -> None:
    return None


def members_are_asked_again(job: Any, claim: Any) -> Any:
    return job


async def parts_before_the_claim(self: Handler, job: Any, done: Done, *, fresh: bool) -> None:
    """What follows from a digest is left out where somebody else may have done it."""
    if fresh:
        await right_follow(self, job, done, fresh=fresh)


right_follow = Handler._follow_digest


@pytest.mark.parametrize(
    ("where", "what", "mistake"),
    [
        (handling, "next_round", nothing_is_left),
        (handling, "with_members", members_are_asked_again),
        (Handler, "_follow_digest", parts_before_the_claim),
    ],
)
@pytest.mark.timeout(300)
def test_each_mistake_is_noticed(
    run: Run, monkeypatch: pytest.MonkeyPatch, where: Any, what: str, mistake: Any
) -> None:
    monkeypatch.setattr(where, what, mistake)
    faults, _ = judged(run, MUTANT_WORLDS)
    assert faults != {}
