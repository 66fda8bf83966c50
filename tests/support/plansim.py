"""Planners of one log in virtual time, over a simulated broker, database and Redis, while rules and preferences change.

A planner that is given the log begins with the mark and reads what is there; from then on only it is handed new records, while
those before it go on with what they hold: zombies. Answers are lost, batches arrive late, leaders show the past, the database
fails over, stores are away, processes freeze and die; in some worlds JOBS is put back to a backup. Everything that is random
comes from one seed.
"""

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from engine.broker.answers import EPOCH_KEY
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, Outgoing, PubAck, Stored, StreamState
from engine.broker.refusals import BATCH_INCOMPLETE, TOO_LARGE
from engine.channels.channel import Job
from engine.errors import ApiError, StoreUnavailable, Unanswered, Unavailable
from engine.jobs.messages import decode_job
from engine.limits import PLAN_WITNESS_SECONDS
from engine.log.marks import Mark, decode_mark, encode_mark
from engine.partition.reader import Delivered
from engine.plan.preferences import Preferences
from engine.plan.profile import Profile
from engine.plan.rules import ChannelRule, TypeRule
from engine.planner import deciding, position, worker
from engine.planner.plans import User
from engine.planner.shares import Above
from engine.planner.witness import Witness
from engine.planner.worker import PlanWorker
from projections.folds.deliveries import Plan, fold
from seamark.protocol.errors import SeamarkError
from seamark.protocol.receipts import decode_receipt
from tests.support.planning import FixedRules
from tests.support.virtualtime import VirtualTime

LOG_EPOCH = "llllllll"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
CALM_ATTEMPTS_MAX = 50
LATE_SECONDS = 20.0
"""A batch that was not answered may still be stored, so much later."""
NEVER_CHANGED = "order.shipped"
"""Type of the records that always go by mail. The rule of the others comes and goes."""
ON = Profile(version=1, reach=("email", "push"))
OFF = Profile(version=2, reach=("email", "push"), preferences=Preferences(channels={"email": "off"}))


def now() -> float:
    return asyncio.get_running_loop().time()


class SimJobs:
    """JOBS: all marks there ever were, and the jobs that were stored with them; a rollup leaves the newest mark."""

    def __init__(self, epoch: str, seq: int = 0) -> None:
        self.epoch = epoch
        self.marks = [(1, Mark(LOG_EPOCH, seq, 100, "topology", epoch))]
        self.seq = 1
        self.jobs: list[tuple[int, Job]] = []

    def commit(self, batch: Sequence[Outgoing]) -> int:
        """The last sequence; ValueError when the expectation of the mark does not hold."""
        *jobs, mark = batch
        assert b"Nats-Rollup:sub" in mark.headers
        _, _, expected = mark.headers.partition(b"Nats-Expected-Last-Subject-Sequence:")
        if expected and self.marks[-1][0] != int(expected.split(b"\r\n")[0]):
            raise ValueError
        self.jobs += [(self.seq + number, decode_job(one.payload)) for number, one in enumerate(jobs, 1)]
        self.seq += len(batch)
        self.marks.append((self.seq, decode_mark(mark.payload)))
        return self.seq

    def sent(self, id: str) -> list[str]:
        """The channels of all jobs there ever were for a notification."""
        return sorted(job.channel for _, job in self.jobs if job.id == id)

    def planner_of(self, seq: int) -> int | None:
        """The term of whoever moved the mark over a record; None: nobody has."""
        return next((mark.term for _, mark in self.marks if mark.seq >= seq), None)


class SimReceipts:
    """RECEIPTS."""

    def __init__(self) -> None:
        self.stored: list[Delivered] = []

    def commit(self, batch: Sequence[Outgoing]) -> int:
        for message in batch:
            at = len(self.stored) * 1_000_000_000
            self.stored.append(Delivered(message.subject.encode(), len(self.stored) + 1, at, b"", message.payload))
        return len(self.stored)


class SimBroker:
    """What a planner asks of a broker. One for all processes; faults are drawn for each request."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.records: list[Delivered] = []
        self.jobs, self.receipts = SimJobs("jjjjjjjj"), SimReceipts()
        self.letters: dict[str, Job] = {}

    async def stream(self, name: str, **_: Any) -> StreamState:
        await self.world.pass_time()
        if self.world.fault(0.02):
            raise Unavailable
        if name == "JOBS":
            epoch, last = self.jobs.epoch, self.jobs.seq
        else:
            back = self.world.rng.randint(0, 8) if self.world.fault(0.1) else 0
            epoch, last = LOG_EPOCH, self.records[max(0, len(self.records) - 1 - back)].seq
        return StreamState(name, epoch, 1, 1, last, 1, {"metadata": {EPOCH_KEY: epoch}})

    async def leader_last(self, stream: str, subject: str, **_: Any) -> Stored | None:
        await self.world.pass_time()
        if self.world.fault(0.03):
            raise Unanswered
        # A deposed leader may show the past.
        back = self.world.rng.randint(0, 3) if self.world.fault(0.1) else 0
        seq, mark = self.jobs.marks[max(0, len(self.jobs.marks) - 1 - back)]
        return Stored(subject, seq, "", b"", encode_mark(mark))

    async def leader_next(self, *_: Any, **__: Any) -> None:
        """Nobody can tell how old the mark is."""
        return

    async def commit(self, batch: Sequence[Outgoing], **_: Any) -> PubAck:
        await self.world.pass_time()
        is_mark = batch[-1].subject.startswith("jmark.")
        if self.world.fault(0.05):
            raise Unavailable  # not stored
        if self.world.fault(0.05):
            raise Unanswered  # not stored, but who knows
        if self.world.fault(0.08):
            asyncio.get_running_loop().call_later(
                self.world.rng.uniform(0.01, LATE_SECONDS), self._arrive, is_mark, batch
            )
            raise Unanswered  # still on its way
        try:
            seq = self._store(is_mark, batch)
        except ApiError:
            await self.world.pass_time()
            raise
        await self.world.pass_time()
        if self.world.fault(0.08):
            raise Unanswered  # stored, the answer was lost
        return PubAck("", seq)

    def _store(self, is_mark: bool, batch: Sequence[Outgoing]) -> int:
        if not is_mark:
            return self.receipts.commit(batch)
        refused = [decode_job(one.payload).id in self.world.indigestible for one in batch[:-1]]
        if any(refused):  # of the first message alone the server says why
            raise ApiError(400, TOO_LARGE if refused[0] else BATCH_INCOMPLETE, "refused")
        try:
            return self.jobs.commit(batch)
        except ValueError:
            raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence") from None

    def _arrive(self, is_mark: bool, batch: Sequence[Outgoing]) -> None:
        with contextlib.suppress(ApiError):  # refused, and nobody hears of it
            self._store(is_mark, batch)

    async def append(self, subject: str, payload: bytes, *_: Any, **__: Any) -> None:
        """Store a dead letter, of which there can be one of each name."""
        await self.world.pass_time()
        if self.world.fault(0.05):
            raise Unavailable
        if subject in self.letters:
            raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence")
        self.letters[subject] = decode_job(payload)
        if self.world.fault(0.05):
            raise Unanswered


class SimWitnesses:
    """A table of which a fail-over may forget what it was told last."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.told: list[Witness] = []

    @property
    def seen(self) -> Witness | None:
        return self.told[-1] if self.told else None

    async def of(self, _: int) -> Witness | None:
        await self.world.ask_store()
        return self.seen

    async def begin(self, _: int, now: Witness, seen: Witness | None) -> None:
        await self.world.ask_store()
        if self.seen == seen and now != seen:
            self.told.append(now)

    def note(self, reached: Witness) -> None:
        if self.seen is not None and self.seen.seq < reached.seq:
            self.told.append(reached)


class SimProfiles:
    """The user's profile: right at the moment it is read, which is some time before whoever asked has it."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.held: list[tuple[float, Profile]] = [(0.0, ON)]

    def turn(self) -> None:
        self.held.append((now(), OFF if self.held[-1][1] is ON else ON))

    async def of_all(self, users: Sequence[User]) -> list[Profile]:
        await self.world.ask_store()
        found = self.held[-1][1]
        await self.world.pass_time()
        return [found for _ in users]

    def may_say(self, off: bool, at: float) -> bool:
        """Whether the choice was this one at a moment, or later."""
        before = [profile for since, profile in self.held if since <= at][-1:]
        return any((profile is OFF) == off for profile in before + [held for since, held in self.held if since > at])


class SimShares:
    """Now the tenant has too many jobs waiting, now it has not."""

    def __init__(self) -> None:
        self.full = False

    def turn(self) -> None:
        self.full = not self.full

    async def above(self, tenants: Iterable[str]) -> Above:
        return Above(frozenset(tenants if self.full else ()))


class World:
    """One log, rules and preferences that change, and planners that fight over it."""

    def __init__(self, seed: int, *, records: int = 60) -> None:
        self.rng = random.Random(seed)
        self.calm = False
        self.broker, self.witnesses, self.profiles = SimBroker(self), SimWitnesses(self), SimProfiles(self)
        self.rules, self.shares = FixedRules(), SimShares()
        # Some worlds have tenants with too many jobs, and jobs that JOBS takes never; the others go on as if there were none.
        self.crowds = random.Random(seed) if seed % 2 == 0 else None
        self.indigestible: set[str] = set()
        self.count = records
        self.chosen: object = None
        self.workers: list[PlanWorker] = []
        self.refused = 0
        self.found: list[str] = []
        self.put_back_at = self.rng.uniform(5, 60) if self.rng.random() < 0.2 else None
        self.witnessed: int | None = None
        self.judged_from = 0
        self.turn_rules()

    # --- chance ------------------------------------------------------------------------------------------------------

    def fault(self, chance: float) -> bool:
        return not self.calm and self.rng.random() < chance

    async def pass_time(self) -> None:
        # Now and then a process is not given the processor for long: time for others to take over.
        frozen = self.fault(0.03)
        await asyncio.sleep(self.rng.uniform(1, 30) if frozen else self.rng.choice((0, 0.002, 0.005, 0.05)))

    async def ask_store(self) -> None:
        await self.pass_time()
        if self.fault(0.05):
            raise StoreUnavailable("away")

    def turn_rules(self) -> None:
        """The rule of some types comes, goes, or names other channels."""
        mail = TypeRule(pattern=NEVER_CHANGED, channels={"email": ChannelRule()})
        channels = self.rng.choice([{}, {"push": ChannelRule()}, {"push": ChannelRule(), "email": ChannelRule()}])
        self.rules.rules = [mail, TypeRule(pattern="demo.hello", channels=channels)]

    def write(self, count: int) -> None:
        """Records that come; other messages lie between them."""
        for _ in range(min(count, self.count - len(self.broker.records))):
            number = len(self.broker.records) + 1
            kind = NEVER_CHANGED if self.rng.random() < 0.3 else "demo.hello"
            body = {"id": f"e{number}", "kind": "notification", "type": kind}
            body |= {"plan": {"inapp": {"when": "now", "why": "default"}}}
            at = int((BEGAN.timestamp() + now()) * 1e9)
            if self.crowds is not None and self.crowds.random() < 0.05:
                self.indigestible.add(f"e{number}")  # jobs of it are what JOBS takes never
            self.broker.records.append(Delivered(b"log.0.t.alice", number * 2, at, b"", json.dumps(body).encode()))

    async def weather(self) -> None:
        """What happens by itself, for ever."""
        noted_at = 0.0
        while True:
            await asyncio.sleep(self.rng.uniform(0.01, 1))
            self.rng.choice([self.turn_rules, self.profiles.turn, *[lambda: self.write(self.rng.randint(1, 8))] * 2])()
            if self.crowds is not None and self.crowds.random() < 0.2:
                self.shares.turn()
            if now() - noted_at >= PLAN_WITNESS_SECONDS:
                noted_at = now()
                for reached in filter(None, (one.reached for one in self.workers)):
                    self.witnesses.note(reached)
            if self.rng.random() < 0.02 and len(self.witnesses.told) > 1 and self.witnessed is None:
                self.witnesses.told.pop()  # the standby that takes over was behind
            if self.put_back_at is not None and now() >= self.put_back_at and self.witnessed is None:
                self.put_back()

    def put_back(self) -> None:
        """JOBS is as it was some marks ago, and nobody has said so."""
        jobs = self.broker.jobs
        del jobs.marks[max(1, len(jobs.marks) - self.rng.randint(1, 10)) :]
        jobs.seq = jobs.marks[-1][0]
        jobs.jobs = [one for one in jobs.jobs if one[0] <= jobs.seq]
        self.witnessed = self.witnesses.seen.seq if self.witnesses.seen is not None else 0

    async def make_anew(self) -> None:
        """What an operator does when planners say so: JOBS without its past, its mark at the end of the log."""
        self.judged_from = self.broker.records[-1].seq
        self.broker.jobs, self.witnessed, self.put_back_at = SimJobs("kkkkkkkk"), None, None
        log, jobs = await self.broker.stream("LOG-0"), await self.broker.stream("JOBS")
        self.broker.jobs.marks = [(1, position.at_the_end(log, jobs))]

    # --- processes ---------------------------------------------------------------------------------------------------

    def worker(self) -> PlanWorker:
        sources = (self.rules, self.profiles, lambda tenant, user: (), self.witnesses)
        self.workers.append(PlanWorker(self.broker, 0, *sources, shares=self.shares))  # type: ignore[arg-type]
        return self.workers[-1]

    async def process(self, worker: PlanWorker) -> None:
        """What a reader does, over and over: get the log, take over, read from the mark, hand on in batches."""
        for attempt in itertools.count():
            if self.calm and attempt > CALM_ATTEMPTS_MAX:
                return  # what is missing then tells
            self.chosen = worker
            try:
                next_seq = await worker.acquire()
                if self.witnessed is not None and next_seq <= self.witnessed:
                    self.found.append(
                        f"records from {next_seq} on are planned again, and {self.witnessed} was witnessed"
                    )
                held = [record for record in self.broker.records if record.seq >= next_seq]
                while held or self.chosen is worker:
                    size = self.rng.randint(1, 10)
                    batch, held = held[:size], held[size:]
                    if batch:
                        await worker.handle(batch)
                        next_seq = batch[-1].seq + 1
                    elif self.calm and len(self.broker.records) == self.count:
                        await worker.pass_over(next_seq - 1)
                        return
                    else:
                        await asyncio.sleep(0.5)
                    if not held and self.chosen is worker:  # only the one that was chosen last is handed more
                        held = [record for record in self.broker.records if record.seq >= next_seq]
            except SeamarkError:
                self.refused += 1
                # It woke up, was refused, and wants to work again: sooner or later.
                await asyncio.sleep(self.rng.uniform(0, 5))

    async def run(self) -> None:
        """Planners come, go and die at any await, while records come and rules change; in the end one is left in peace."""
        random.seed(self.rng.random())  # what the pauses of the engine are drawn from
        self.write(5)
        weather = asyncio.create_task(self.weather(), name="weather")
        tasks: list[asyncio.Task[None]] = []
        for _ in range(self.rng.randint(3, 8)):
            if tasks and self.rng.random() < 0.6:
                tasks.pop(self.rng.randrange(len(tasks))).cancel()
            tasks.append(asyncio.create_task(self.process(self.worker()), name="process"))
            await asyncio.sleep(self.rng.uniform(0.01, 15))
        for task in (weather, *tasks):
            task.cancel()
        for ended in await asyncio.gather(weather, *tasks, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError | None):
                raise ended
        self.calm = True
        await asyncio.sleep(LATE_SECONDS)  # what is still on its way arrives
        if self.witnessed is not None:
            await self.make_anew()
        self.write(self.count)
        await self.process(self.worker())

    # --- judgement ---------------------------------------------------------------------------------------------------

    def without_letter(self, id: str, plan_shown: Plan | None) -> set[str]:
        """The channels for which there has to be a dead letter, and is none."""
        told = {} if plan_shown is None else plan_shown.channels
        wanted = {channel for channel, (_, why) in told.items() if why == "throttled"}
        if id in self.indigestible:
            wanted |= set(goes_by(plan_shown))
        return wanted - {job.channel for job in self.broker.letters.values() if job.id == id}

    def shown(self) -> dict[tuple[str, str, str], Plan]:
        """The fold of all receipts, in any order: here in the reverse one."""
        return fold(reversed(self.broker.receipts.stored)).plans

    def faults(self) -> list[str]:
        """What is wrong with the plans that are shown."""
        said: dict[tuple[str, int], set[str]] = {}
        for stored in self.broker.receipts.stored:
            receipt = decode_receipt(stored.payload)
            plan = receipt.plan or {}
            said.setdefault((receipt.id or "", receipt.term), set(plan))
            at = (receipt.at - BEGAN).total_seconds()
            if "email" in plan and not self.profiles.may_say(plan["email"].why == "user_off", at):
                self.found.append(f"{receipt.id} was planned at {at:.3f} by a preference from before")
        shown = self.shown()
        for record in self.broker.records:
            id, kind = (json.loads(record.payload)[name] for name in ("id", "type"))
            term, plan_shown = self.broker.jobs.planner_of(record.seq), shown.get(("t", "alice", id))
            if record.seq <= self.judged_from:
                continue
            if term is None:
                self.found.append(f"{id} was never planned")
            elif plan_shown is not None and plan_shown.term != term:
                self.found.append(f"{id}: shown is the plan of term {plan_shown.term}, and {term} has committed")
            elif plan_shown is None and kind == NEVER_CHANGED:
                self.found.append(f"{id}: no plan is shown")
            elif self.broker.jobs.sent(id) != ([] if id in self.indigestible else goes_by(plan_shown)):
                self.found.append(f"{id} has jobs for {self.broker.jobs.sent(id)}, and shown is {plan_shown}")
            elif missing := self.without_letter(id, plan_shown):
                self.found.append(f"{id} has no letter for {missing}, and shown is {plan_shown}")
            elif plan_shown is not None and said[id, term] != set(plan_shown.channels):
                self.found.append(f"{id}: a plan of {set(plan_shown.channels)} is shown")
        return self.found


def goes_by(plan: Plan | None) -> list[str]:
    """The channels that a plan sends something by."""
    told = {} if plan is None else plan.channels
    return sorted(channel for channel, (when, _) in told.items() if when == "now" and channel != "inapp")


@contextmanager
def simulated(patch: pytest.MonkeyPatch) -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """What runs a world to its end. Clocks of workers are the world's, and a round is of four records."""
    loop = VirtualTime()
    clock = SimpleNamespace(now=lambda zone: BEGAN + timedelta(seconds=loop.time()))
    patch.setattr(worker, "datetime", clock)
    patch.setattr(deciding, "datetime", clock)
    patch.setattr(worker, "time", SimpleNamespace(monotonic=loop.time, time_ns=lambda: round(loop.time() * 1e9)))
    patch.setattr(worker, "PLAN_ROUND", 4)
    try:
        yield loop.run_until_complete
    finally:
        loop.close()
