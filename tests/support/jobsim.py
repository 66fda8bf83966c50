"""A simulated world for jobs: JOBS, Redis, receipts and a provider in memory, in virtual time, and workers that come and go.

Workers die at any await, sleep for minutes and wake up; their clocks are wrong; answers are lost, writes come late, messages are
handed out again, Redis is away, loses everything or goes back to a moment before, `deliveries` is behind; operators hold jobs
and let them go, users opt out. Each world draws which of these troubles it knows, so that what only some of them excuse is found
in the others. All that is random comes from one seed.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from engine import patience
from engine.channels.channel import Job, Outcome
from engine.errors import StoreUnavailable, Unanswered, Unavailable
from engine.jobs import claims as rules
from engine.jobs import handling
from engine.jobs.claims import Leased
from engine.jobs.desk import Hold, Over, Send, Split
from engine.jobs.handling import Handler
from engine.jobs.retry import RetryPolicy
from seamark.protocol.receipts import Receipt
from tests.support.jobstores import (
    ACK_WAIT_SECONDS,
    BEGAN,
    DOUBTS,
    FINAL,
    LATE_SECONDS,
    SimClaims,
    SimDelivery,
    SimJobs,
    SimJournal,
    answered,
    handled,
    key_of,
    now,
    rank_of,
)
from tests.support.virtualtime import VirtualTime

CALM_SECONDS_MAX = 6 * 3600.0
CLOCKS_SECONDS = 10.0
POLICY = RetryPolicy((5, 20, 60), (0, 1), 900)
TROUBLES = ("kills", "freezes", "claims", "broker", "again", "holds", "slow")
"""And "behind": `deliveries` does not know what it is asked."""


@dataclass
class SimClock:
    """A worker's clock."""

    off_seconds: float

    def now(self) -> datetime:
        return BEGAN + timedelta(seconds=now() + self.off_seconds)


class SimDesk:
    """Users, controls, and the provider, as one worker sees them."""

    def __init__(self, world: "World", clock: SimClock) -> None:
        self.world, self.clock, self.repeatable = world, clock, world.recognises

    def slower(self, outcome: Outcome) -> float:
        return 1.0

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        await self.world.ask_store()
        rng, at = self.world.rng, self.clock.now()
        if job.id in self.world.cursed:
            raise asyncio.CancelledError  # whoever decides about it dies
        if job.expires_at is not None and job.expires_at <= at:
            return Over("expired", "expired")
        if job.user in self.world.opted_out:
            return Over("suppressed", "opted_out")
        if self.world.held:
            return Hold(at + timedelta(seconds=rng.uniform(1, 20)), "killed:all")
        if job.stage == "first" and job.id in self.world.quiet:
            return Hold(BEGAN + timedelta(seconds=self.world.quiet[job.id]), "quiet_hours", "quiet_hours")
        if job.channel == "push" and job.target == "":
            return Split(("a", "b"))
        if job.id in self.world.broken:
            return Over("failed", "template", Outcome(kind="permanent", code="template"))
        return Send(None, None)

    async def turn(self, job: Job, send: Send) -> float:
        await self.world.pass_time()
        return self.world.rng.uniform(1, 15) if self.world.fault("slow", 0.3) else 0.0

    def unused(self, send: Send) -> None: ...

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        world, key = self.world, job.key
        if not {"freezes", "claims"} & world.troubles and not isinstance(world.claims.at(key).claim, Leased):
            world.found.append(f"{key}: is sent without a lease")
        lasts = world.rng.uniform(0, deadline_seconds / 2) if world.fault("slow", 0.3) else 0.0
        await asyncio.sleep(lasts)
        await world.pass_time()
        outcome = world.answer()
        if outcome.kind != "config":
            world.tries[key] += 1
        if outcome.kind == "ok" or (outcome.kind == "ambiguous" and world.rng.random() < 0.5):
            world.accepted[key] += 1
        await asyncio.sleep(lasts)
        await world.pass_time()
        if (said := answered.get()) is not None:
            said.append(outcome.kind)
        return outcome


class World:
    """Jobs, workers that come and go, and what troubles them."""

    def __init__(self, seed: int, *, jobs: int = 6, troubles: Iterable[str] | None = None) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.calm = False
        drawn = {one for one in TROUBLES if self.rng.random() < 0.5}
        self.troubles = drawn if troubles is None else set(troubles)
        self.freezing = self.rng.choice((0.01, 0.04))
        self.recognises = self.rng.random() < 0.2
        self.found: list[str] = []
        self.jobs, self.claims, self.journal = SimJobs(self), SimClaims(self), SimJournal(self)
        self.left = jobs
        self.known: dict[str, Job] = {}
        self.opted_out: set[str] = set()
        self.quiet: dict[str, float] = {}
        self.broken: set[str] = set()
        self.cursed: set[str] = set()
        self.held = False
        self.tries: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.confirmed: set[str] = set()
        self.kills = self.losses = 0
        if troubles is None and self.rng.random() < 0.5:
            self.troubles.add("behind")

    # --- chance ------------------------------------------------------------------------------------------------------

    def fault(self, trouble: str, chance: float) -> bool:
        return not self.calm and trouble in self.troubles and self.rng.random() < chance

    async def pass_time(self) -> None:
        frozen, message = self.fault("freezes", self.freezing), handled.get()
        if message is not None and not frozen:
            message.free_at = max(message.free_at, now() + ACK_WAIT_SECONDS)  # its worker says that it is at it
        await asyncio.sleep(self.rng.uniform(20, 200) if frozen else self.rng.choice((0, 0, 0.002, 0.01, 0.3)))

    async def ask_store(self) -> None:
        await self.pass_time()
        if self.fault("broker", 0.03):
            raise StoreUnavailable("away")

    async def write(self, apply: Callable[[], object]) -> None:
        """A write of which the answer may be lost, or which may come late."""
        await self.pass_time()
        if self.fault("broker", 0.03):
            raise Unavailable("not stored")
        if self.fault("broker", 0.04):
            asyncio.get_running_loop().call_later(self.rng.uniform(0.01, LATE_SECONDS), apply)
            raise Unanswered("on its way")
        apply()
        await self.pass_time()
        if self.fault("broker", 0.04):
            raise Unanswered("stored, the answer was lost")

    def answer(self) -> Outcome:
        """What the provider says."""
        drawn = self.rng.random()
        if self.calm or drawn < 0.55:
            return Outcome(kind="ok", provider="sim")
        for kind, share in (("transient", 0.75), ("throttled", 0.8), ("ambiguous", 0.88), ("config", 0.92)):
            if drawn < share:
                pause = self.rng.uniform(1, 60) if kind == "throttled" else None
                return Outcome(kind=kind, provider="sim", code=kind, retry_after_seconds=pause)  # type: ignore[arg-type]
        kind = self.rng.choice(("permanent", "target_invalid", "opted_out"))
        return Outcome(kind=kind, provider="sim", code=kind)  # type: ignore[arg-type]

    def new_job(self) -> None:
        if not self.left:
            return
        self.left -= 1
        id, made = f"n{self.left}", BEGAN + timedelta(seconds=now() + self.rng.uniform(-1, 1))
        lasts = self.rng.random() < 0.3
        job = Job(
            id=id,
            tenant="t",
            user=f"u{self.rng.randint(0, 3)}",
            type="sim.n",
            channel=self.rng.choice(("push", "email", "email")),
            lane=self.rng.choice(("normal", "bulk")),
            semantics=self.rng.choice(("at_least_once", "effectively_once")),
            first_at=made,
            expires_at=made + timedelta(seconds=self.rng.uniform(5, 300)) if lasts else None,
        )
        if self.rng.random() < 0.2:
            self.quiet[id] = now() + self.rng.uniform(5, 120)
        if self.rng.random() < 0.05:
            self.broken.add(id)
        if "kills" in self.troubles and self.rng.random() < 0.03:
            self.cursed.add(id)
        self.known[job.key] = job
        self.jobs.put(job)

    # --- processes ---------------------------------------------------------------------------------------------------

    async def worker(self) -> None:
        """A process that handles up to three jobs at a time; with it they end."""
        clock = SimClock(self.rng.uniform(-3, 3))
        handler = Handler(self.claims, self.jobs, self.journal, SimDesk(self, clock), POLICY, clock)
        async with asyncio.TaskGroup() as tasks:
            busy: set[asyncio.Task[None]] = set()
            while True:
                await asyncio.sleep(self.rng.choice((0.1, 0.5, 2.0)))
                busy = {task for task in busy if not task.done()}
                delivery = self.jobs.pull() if len(busy) < 3 else None
                if delivery is not None:
                    busy.add(tasks.create_task(self._handle(handler, delivery), name="job"))

    async def _handle(self, handler: Handler, delivery: SimDelivery) -> None:
        said: list[str] = []
        handled.set(delivery.message)
        answered.set(said)
        await handler.handle(delivery)
        if "ok" in said:
            self.confirmed.add(delivery.job.key)

    async def weather(self) -> None:
        """What happens by itself, for ever."""
        while True:
            await asyncio.sleep(self.rng.uniform(0.1, 8))
            self.new_job()
            if self.fault("holds", 0.2) or self.held:
                self.held = not self.held
            if self.fault("again", 0.05):
                self.jobs.deliver_again()
            if self.rng.random() < 0.03:
                self.opted_out.add(f"u{self.rng.randint(0, 3)}")
            if self.fault("claims", 0.05):
                self.claims.away_until = now() + self.rng.uniform(1, 60)
            if self.fault("claims", 0.1):
                self.claims.snapshot = dict(self.claims.held)
            if self.fault("claims", 0.05):
                self.losses += 1
                self.claims.lose()
            if self.fault("behind", 0.05):
                self.journal.behind_until = now() + self.rng.uniform(1, 120)

    async def run(self) -> None:
        """Workers die and are started anew while jobs come; in the end they are left in peace until nothing waits."""
        random.seed(self.rng.random())
        start = asyncio.get_running_loop().create_task
        weather, workers = start(self.weather(), name="weather"), [start(self.worker(), name="w") for _ in range(3)]
        until = now() + self.rng.uniform(60, 600)
        while now() < until:
            await asyncio.sleep(self.rng.uniform(1, 20))
            if "kills" in self.troubles:
                self.kills += 1
                workers.pop(self.rng.randrange(3)).cancel()
                workers.append(start(self.worker(), name="w"))
        self.calm, self.held = True, False
        while self.left:
            self.new_job()
        end = now() + CALM_SECONDS_MAX
        quiet_since = now()
        while now() < end and now() - quiet_since < LATE_SECONDS + 1:
            await asyncio.sleep(1)
            if not self.jobs.empty:
                quiet_since = now()
        for task in (weather, *workers):
            task.cancel()
        for ended in await asyncio.gather(weather, *workers, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError | None):
                raise ended

    # --- judgement ---------------------------------------------------------------------------------------------------

    def faults(self) -> list[str]:
        """What is wrong with how jobs have ended."""
        if not self.jobs.empty:
            self.found.append(f"{len(self.jobs.messages)} messages and {len(self.jobs.schedules)} schedules are left")
        for key, job in self.known.items():
            self.found += [f"{key}: {fault}" for fault in self._faults_of(key, job)]
        if "claims" not in self.troubles:
            promised = {key_of(one) for one in self.journal.receipts if one.state == "queued"}
            self.found += [f"{key}: is said to wait, and was never made" for key in promised - self.known.keys()]
        return self.found

    def _faults_of(self, key: str, job: Job) -> Iterator[str]:
        receipts, accepted = self.journal.of(key), self.accepted[key]
        last = max(receipts, key=rank_of, default=None)
        if last is None or last.state not in FINAL:
            yield f"it ended as {last}"
            return
        doubts: set[tuple[str | None, int, datetime | None]]
        doubts = {(one.reason, one.attempt, one.at) for one in receipts if one.reason in DOUBTS}
        doubts |= {(one.reason, one.attempt, None) for one in receipts if one.reason == one.state == "ambiguous"}
        if accepted > 1 + len(doubts):
            yield f"it was accepted {accepted} times, and doubted {len(doubts)} times"
        if job.semantics == "effectively_once" and not self.recognises and accepted > 1:
            yield f"it was to be sent once, and was accepted {accepted} times"
        if last.state == "sent" and not accepted:
            yield "it is said to be sent, and was not accepted"
        if accepted and last.state not in {"sent", "ambiguous"} and not doubts:
            yield f"it was accepted, and is said to be {last.state}"
        if key in self.confirmed and last.state != "sent" and "claims" not in self.troubles:
            yield f"its worker knew that it was accepted, and it is said to be {last.state}"
        if last.state not in {"sent", "split"} and key not in self.journal.letters:
            yield f"it ended as {last.state} without a dead letter"
        if last.reason == "target_invalid" and key not in self.journal.retired:
            yield "its target was invalid and is not retired"
        yield from self._without_cause(key, receipts, len(doubts))

    def _without_cause(self, key: str, receipts: list[Receipt], doubts: int) -> Iterator[str]:
        """What only some troubles excuse."""
        reasons = {one.reason for one in receipts}
        if not {"kills", "freezes", "claims"} & self.troubles and reasons & DOUBTS:
            yield f"{reasons & DOUBTS}, and every worker has recorded what it did"
        if not {"kills", "freezes", "again"} & self.troubles and "poison" in reasons:
            yield "it is taken for poison, and no worker has died"
        if "claims" in self.troubles:
            return
        if self.tries[key] > POLICY.tries_max:
            yield f"it was tried {self.tries[key]} times"
        ends = {one.state for one in receipts if one.state in FINAL and one.reason not in DOUBTS | {"ambiguous"}}
        if len(ends) > 1 and not (doubts and len(ends - {"sent"}) == 1):
            yield f"it has ended as {sorted(ends)}"


@contextmanager
def simulated(patch: pytest.MonkeyPatch) -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """What runs a world to its end. Claims are kept for minutes, so that some jobs outlive them."""
    clock = SimpleNamespace(monotonic=now)
    patch.setattr(handling, "time", clock)
    patch.setattr(patience, "time", clock)
    patch.setattr(rules, "CLAIM_KEPT_SECONDS", 900.0)
    patch.setattr(rules, "CLAIM_HORIZON_SECONDS", 840.0)
    patch.setattr(rules, "CLOCKS_SECONDS", CLOCKS_SECONDS)
    for module in (rules, handling):
        patch.setattr(module, "CLAIM_CONFIRMED_SECONDS", 30.0)

    def run(world: Coroutine[Any, Any, None]) -> None:
        loop = VirtualTime()  # each world has a time of its own, or a seed would not be the same world each time
        try:
            loop.run_until_complete(world)
        finally:
            loop.close()

    yield run
