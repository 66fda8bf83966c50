"""Workers in worlds by the hundred: whatever is lost, late, doubled, forgotten or killed, each job ends once, and repetitions
are told.

SEAMARK_WORLDS=10000 runs so many.
"""

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime
from typing import Any

import pytest

from engine.channels.channel import Job
from engine.jobs import handling, life
from engine.jobs.claims import Claim, ClaimsUnavailable, Done, Leased, Look, Waiting
from engine.jobs.claims import replaces as right_replaces
from engine.jobs.desk import Over, Send
from engine.jobs.handling import Handler
from engine.jobs.life import Drop, Go, PutBack
from engine.jobs.life import judge as right_judge
from engine.jobs.receipts import doubt_receipts, part_receipts, receipts_of
from engine.jobs.splitting import parts_of
from engine.patience import patiently
from tests.support.jobsim import POLICY, SimClock, SimDesk, World, simulated
from tests.support.jobstores import BEGAN

WORLDS = int(os.environ.get("SEAMARK_WORLDS") or 100)
MUTANT_WORLDS = 300

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    with simulated(monkeypatch) as run:
        yield run


def judged(run: Run, worlds: Iterable[World]) -> tuple[dict[int, list[str]], list[World]]:
    """The faults of the first of these worlds that has some, by its seed, and the worlds up to there."""
    seen = []
    for world in worlds:
        seen.append(world)
        run(world.run())
        if faults := world.faults():
            return {world.seed: faults}, seen
    return {}, seen


@pytest.mark.timeout(120 + WORLDS / 5)
def test_whatever_is_lost_late_forgotten_or_killed_each_job_ends_once_and_each_repetition_is_told(run: Run) -> None:
    faults, worlds = judged(run, map(World, range(WORLDS)))
    assert faults == {}
    reasons = {one.reason for world in worlds for one in world.journal.receipts}
    ends = {one.state for world in worlds for one in world.journal.receipts}
    assert {"lease_lost", "forgotten", "unclaimed", "poison"} <= reasons, "the worlds are wild enough"
    assert {"sent", "failed", "suppressed", "expired", "ambiguous", "split", "queued"} <= ends
    assert sum(world.journal.refused for world in worlds) > WORLDS / 5, "`deliveries` was asked in vain"
    assert sum(count > 1 for world in worlds for count in world.accepted.values()) > WORLDS / 50, "and some repeat"


def test_a_job_that_is_put_back_to_the_very_moment_it_came_from_is_not_lost(run: Run) -> None:
    """The end of a dead worker's lease gives the moment. Where a clock is slow it is past, and the same each time."""
    world = World(0, jobs=0, troubles=())
    world.pass_time = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    clock = SimClock(-3.0)
    handler = Handler(world.claims, world.jobs, world.journal, SimDesk(world, clock), POLICY, clock)
    job = Job(id="n", tenant="t", user="u", type="sim.n", channel="email", again=True, first_at=BEGAN)
    lease = Leased(0, "a worker that has died")

    async def take_turns() -> None:
        await world.claims.put(job.key, await world.claims.look(job.key), lease, lease_seconds=45, keep_seconds=900)
        world.jobs.put(job)
        await asyncio.sleep(43.5)
        for _ in range(3):
            delivery = world.jobs.pull()
            assert delivery is not None, "it was put back, and is gone"
            await handler.handle(delivery)

    run(take_turns())
    assert (world.jobs.empty, world.found) == (False, [])


# --- mistakes --------------------------------------------------------------------------------------------------------

right_init, right_follow, right_go = Handler.__init__, Handler._follow, Handler._go
right_put_back, right_must_not = Handler._put_back_until, Handler._must_not_repeat
right_leased, right_unclaimed = life._leased, life._unclaimed


async def done_is_only_acknowledged(
    self: Handler, delivery: Any, claim: Claim, look: Any = None, *, fresh: bool = False
) -> None:
    if isinstance(claim, Done) and not fresh:
        return await self._ack(delivery)
    return await right_follow(self, delivery, claim, look, fresh=fresh)


async def waiting_is_only_acknowledged(
    self: Handler, delivery: Any, claim: Claim, look: Any = None, *, fresh: bool = False
) -> None:
    if isinstance(claim, Waiting) and not fresh:
        return await self._ack(delivery)
    return await right_follow(self, delivery, claim, look, fresh=fresh)


async def leased_is_only_acknowledged(
    self: Handler, delivery: Any, claim: Claim, look: Any = None, *, fresh: bool = False
) -> None:
    if isinstance(claim, Leased):
        return await self._ack(delivery)
    return await right_follow(self, delivery, claim, look, fresh=fresh)


async def acknowledged_first(
    self: Handler, delivery: Any, claim: Claim, look: Any = None, *, fresh: bool = False
) -> None:
    await self._ack(delivery)
    await right_follow(self, delivery, claim, look, fresh=fresh)


async def without_consequences(
    self: Handler, delivery: Any, claim: Claim, look: Any = None, *, fresh: bool = False
) -> None:
    if fresh or not isinstance(claim, Done):
        return await right_follow(self, delivery, claim, look, fresh=fresh)
    await self._store(delivery.job, receipts_of(delivery.job, claim, self._clock.now()))
    return await self._ack(delivery)


async def refused(self: Handler, delivery: Any, job: Job, due: datetime) -> None:
    await delivery.refuse()


async def put_back_after_acknowledging(self: Handler, delivery: Any, job: Job, due: datetime) -> None:
    await self._ack(delivery)
    await right_put_back(self, delivery, job, due)


async def put_back_as_if_it_were_new(self: Handler, delivery: Any, job: Job, due: datetime) -> None:
    await patiently(self._queue.schedule, job, due, seconds=math.inf)
    await self._ack(delivery)


async def claimed_before_its_turn(self: Handler, delivery: Any, look: Look | None, go: Go, owner: str) -> bool:
    decided = await patiently(self._desk.decide, delivery.job, seconds=math.inf)
    if look is None or not isinstance(decided, Send) or self._must_not_repeat(delivery.job, go):
        return await right_go(self, delivery, look, go, owner)
    lease = Leased(delivery.job.attempt, owner, go.lost, go.doubtful)
    try:
        look = await self._claims.put(delivery.job.claim_key, look, lease, lease_seconds=45.0, keep_seconds=900.0)
    except ClaimsUnavailable:
        return False
    if look.claim != lease:
        return False
    seconds = await self._desk.turn(delivery.job, decided)
    if seconds > 0:
        await self._put_back(delivery, seconds)
        return True
    if go.doubt is not None:
        await self._store(delivery.job, doubt_receipts(delivery.job, go.doubt, self._clock.now()))
    return await self._try(delivery, look, lease, decided)


async def sent_before_it_is_claimed(self: Handler, delivery: Any, look: Look | None, lease: Leased, send: Send) -> bool:
    outcome = await self._desk.send(delivery.job, send, deadline_seconds=30.0)
    said = handling.settle(
        delivery.job, lease, outcome, self._policy, self._clock.now(), 0.5, repeatable=self._repeatable(delivery.job)
    )
    claim, last = await self._record(delivery.job, look, said, lease)
    await self._follow(delivery, claim, last)
    return True


async def ended_without_a_claim(self: Handler, delivery: Any, look: Look | None, done: Done) -> bool:
    await self._follow(delivery, done)
    return True


async def told_nobody(self: Handler, delivery: Any, look: Look | None, go: Go, owner: str) -> bool:
    return await right_go(self, delivery, look, go if self._must_not_repeat(delivery.job, go) else Go(), owner)


async def let_go_of_all(self: Handler, delivery: Any, look: Look | None, done: Done) -> None:
    if look is not None:
        with contextlib.suppress(ClaimsUnavailable):
            await self._claims.put(delivery.job.claim_key, look, done, keep_seconds=1.0)


def said_by_anybody(new: Any, found: Claim | None, lease: Leased) -> Any:
    return new


def said_by_the_owner_only(new: Any, found: Claim | None, lease: Leased) -> Any:
    ours = found is None or (isinstance(found, Leased) and found.owner == lease.owner)
    return new if ours else None


def hidden_by_a_later_attempt(new: Any, found: Claim | None, lease: Leased) -> Any:
    return None if right_replaces(new, found, lease) is None else new


def without_counting(*args: Any, **options: Any) -> Any:
    step = right_judge(*args, **options)
    return step._replace(lost=0) if isinstance(step, Go) else step


def busy_is_dropped(*args: Any) -> Any:
    step = right_leased(*args)
    return Drop() if isinstance(step, PutBack) else step


def leases_do_not_count(*args: Any) -> Any:
    step = right_leased(*args)
    return None if isinstance(step, PutBack) else step


def without_a_claim_and_a_word(*args: Any, **asked: Any) -> Any:
    step = right_unclaimed(*args, **asked)
    return Go() if isinstance(step, Go) else step


def held_by_nobody_else(job: Job, deliveries: int, held_seconds: float) -> bool:
    return deliveries > 1 or job.again


def an_old_attempt_goes_on(job: Job, *args: Any, **options: Any) -> Any:
    step = right_judge(job, *args, **options)
    return Go() if isinstance(step, life.Follow) and isinstance(step.claim, Waiting) else step


def over_whatever_was_tried(job: Job, go: Go, decided: Any) -> Done:
    if isinstance(decided, Over):
        return Done(job.attempt, decided.end, decided.why)
    return right_end(job, go, decided)


async def split_before_it_is_settled(self: Handler, delivery: Any, look: Look | None, done: Done) -> bool:
    if done.end == "split":
        job = delivery.job
        await self._store(job, part_receipts(job, done.targets, None, self._clock.now()))
        await patiently(self._queue.add, parts_of(job, done), seconds=math.inf)
        done = Done(done.attempt, "split")
    return await right_conclude(self, delivery, look, done)


class Awaited:
    """A journal that is asked until it answers."""

    def __init__(self, journal: Any) -> None:
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)

    async def ended(self, job: Job) -> Done | None:
        return await patiently(self._journal.ended, job, seconds=math.inf)


def waits_for_deliveries(self: Handler, claims: Any, queue: Any, journal: Any, *others: Any) -> None:
    right_init(self, claims, queue, Awaited(journal), *others)


right_end, right_conclude = handling.end_of, Handler._conclude

Mistake = tuple[Any, str, Any, str]
"""Where it is made, what is wrong there, and the troubles of the worlds that show it."""

# That a job which must go once waits while Redis is away is no entry: to forget it changes nothing, for whoever goes on then
# is stopped before it sends ("what must not be repeated is"). Nor is it one to ask no deliveries then: it spares repetitions,
# and those that there are have been announced.
SHOWN_BY = {
    "acknowledged when the lease is somebody else's": 25,
    "a late acceptance is hidden by a later attempt": 78,
    "however long it was held it is nobody else's": 15,
}
"""The first world that shows a mistake, where few do: those before it need not be run each time."""

MISTAKES: dict[str, Mistake] = {
    "acknowledged on done, without its receipt": (Handler, "_follow", done_is_only_acknowledged, "kills again broker"),
    "acknowledged on waiting, without its schedule": (Handler, "_follow", waiting_is_only_acknowledged, "freezes slow"),
    "acknowledged when the lease is somebody else's": (Handler, "_follow", leased_is_only_acknowledged, "freezes slow"),
    "acknowledged before the receipt and the schedule": (Handler, "_follow", acknowledged_first, "holds"),
    "done is followed by its receipt only": (Handler, "_follow", without_consequences, "kills again broker"),
    "refused instead of put back": (Handler, "_put_back_until", refused, "holds"),
    "acknowledged before it is put back": (Handler, "_put_back_until", put_back_after_acknowledging, "freezes slow"),
    "put back as if it were new": (Handler, "_put_back_until", put_back_as_if_it_were_new, "kills slow again"),
    "claimed before its turn": (Handler, "_go", claimed_before_its_turn, "again slow"),
    "sent before it is claimed": (Handler, "_try", sent_before_it_is_claimed, "freezes kills slow"),
    "ended without a claim": (Handler, "_conclude", ended_without_a_claim, "freezes kills slow"),
    "a repetition that is told nobody": (Handler, "_go", told_nobody, "freezes kills slow"),
    "what must not be repeated is": (
        Handler,
        "_must_not_repeat",
        lambda self, job, go: False,
        "claims broker kills slow",
    ),
    "claims of all ended jobs are let go": (Handler, "_let_go", let_go_of_all, "freezes slow"),
    "a try in doubt is said not to have been": (handling, "end_of", over_whatever_was_tried, "kills slow again"),
    "split before it is settled": (Handler, "_conclude", split_before_it_is_settled, "freezes kills"),
    "an outcome is said by anybody": (handling, "replaces", said_by_anybody, "freezes slow"),
    "an acceptance is said by the owner only": (handling, "replaces", said_by_the_owner_only, "freezes slow"),
    "a late acceptance is hidden by a later attempt": (handling, "replaces", hidden_by_a_later_attempt, "freezes slow"),
    "lost tries do not count": (handling, "judge", without_counting, "freezes kills slow"),
    "an old attempt goes on": (handling, "judge", an_old_attempt_goes_on, "freezes kills slow"),
    "a busy job is dropped": (life, "_leased", busy_is_dropped, "again slow"),
    "a lease is no obstacle": (life, "_leased", leases_do_not_count, "again slow"),
    "without a claim and a word": (life, "_unclaimed", without_a_claim_and_a_word, "claims broker"),
    "however long it was held it is nobody else's": (
        life,
        "may_be_shared",
        held_by_nobody_else,
        "claims freezes broker again",
    ),
    "its place is held until deliveries answer": (Handler, "__init__", waits_for_deliveries, "behind claims kills"),
    "Redis is believed whatever it has lost": (life, "believable", lambda look, job: True, "claims kills"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.timeout(180)
def test_every_mistake_of_a_worker_is_noticed(mistake: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    *patch, troubles = MISTAKES[mistake]
    monkeypatch.setattr(*patch)
    seeds = range(SHOWN_BY.get(mistake, 0), MUTANT_WORLDS)
    faults, _ = judged(run, (World(seed, jobs=15, troubles=troubles.split()) for seed in seeds))
    assert faults, "no world noticed"
