"""Stores of a simulated world for jobs, in memory and virtual time: JOBS, Redis with its claims, receipts and `deliveries`."""

import asyncio
import contextvars
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from engine.channels.channel import Job
from engine.errors import StoreUnavailable, Unavailable
from engine.jobs.claims import Claim, ClaimsUnavailable, Done, Leased, Look, Waiting
from engine.jobs.messages import schedule_of
from engine.jobs.redisclaims import SAID_SECONDS_MAX
from projections.folds.deliveries import rank
from seamark.protocol.receipts import Receipt

if TYPE_CHECKING:
    from tests.support.jobsim import World

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
ACK_WAIT_SECONDS = 60.0
DUPLICATE_WINDOW_SECONDS = 120.0
LATE_SECONDS = 20.0
"""A write that was not answered may still arrive, so much later."""
FOLD_LAG_SECONDS = 10.0
FINAL = frozenset({"sent", "failed", "suppressed", "expired", "cancelled", "ambiguous", "split"})
DOUBTS = frozenset({"lease_lost", "forgotten", "unclaimed"})


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Message:
    """A job in JOBS."""

    job: Job
    free_at: float
    deliveries: int = 0


handled: contextvars.ContextVar[Message | None] = contextvars.ContextVar("handled", default=None)
answered: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("answered", default=None)


class SimJobs:
    """JOBS: messages and schedules, and the queue of the worker that writes into it."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.messages: dict[int, Message] = {}
        self.schedules: dict[str, tuple[float, Job]] = {}
        self.named: dict[str, float] = {}
        self.count = 0

    def put(self, job: Job) -> None:
        self.count += 1
        self.messages[self.count] = Message(job, 0.0)

    def fire(self) -> None:
        """Schedules become messages; the clock is the broker's."""
        for name, (due, job) in list(self.schedules.items()):
            if due <= now():
                del self.schedules[name]
                self.put(job)

    def pull(self) -> "SimDelivery | None":
        self.fire()
        free = [number for number, one in self.messages.items() if one.free_at <= now()]
        if not free:
            return None
        number = self.world.rng.choice(free)
        message = self.messages[number]
        message.deliveries += 1
        message.free_at = now() + ACK_WAIT_SECONDS
        return SimDelivery(self, number, message, message.deliveries, now())

    def deliver_again(self) -> None:
        """A new leader does not know what was handed out."""
        for message in self.messages.values():
            if self.world.rng.random() < 0.5:
                message.free_at = min(message.free_at, now())

    async def schedule(self, job: Job, due: datetime) -> None:
        await self.world.write(lambda: self._schedule(job, due))

    def _schedule(self, job: Job, due: datetime) -> None:
        name = schedule_of(job, due).subject  # its message id, too
        if now() - self.named.get(name, -1e9) > DUPLICATE_WINDOW_SECONDS:
            self.named[name] = now()
            self.schedules[name] = ((due - BEGAN).total_seconds(), job)

    async def add(self, jobs: Sequence[Job]) -> None:
        await self.world.write(lambda: self._add(jobs))

    def _add(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.world.known[job.key] = job
            self.put(job)

    def acknowledge(self, number: int) -> None:
        """What is acknowledged has ended, and that is told; or something is left that goes on with it."""
        acknowledged = self.messages.pop(number, None)
        if acknowledged is None:
            return
        key = acknowledged.job.key
        left = [one.job for one in self.messages.values()] + [job for _, job in self.schedules.values()]
        # A doubt is told in the same words before a job is tried again; that it was the end is then only in the claim.
        told = {
            one.state
            for one in self.world.journal.of(key)
            if one.reason not in DOUBTS or "claims" in self.world.troubles
        }
        ended = told & FINAL or isinstance(self.world.claims.at(key).claim, Done)
        if not ended and all(job.key != key for job in left):
            self.world.found.append(f"{key}: its last message is acknowledged, and it has not ended")

    @property
    def empty(self) -> bool:
        return not self.messages and not self.schedules


@dataclass
class SimDelivery:
    """A message as it was handed out."""

    jobs: SimJobs
    number: int
    message: Message
    deliveries: int
    handed_at: float

    @property
    def held_seconds(self) -> float:
        return now() - self.handed_at

    @property
    def job(self) -> Job:
        return self.message.job

    async def ack(self, confirmed: bool) -> None:
        world = self.jobs.world
        if confirmed:
            await world.write(lambda: self.jobs.acknowledge(self.number))
        elif world.fault("broker", 0.03):
            raise Unavailable("not said")
        elif not world.fault("broker", 0.04):  # else it is lost, and nobody knows
            self.jobs.acknowledge(self.number)

    async def refuse(self) -> None:
        """What a worker must not do: have the message handed out again."""
        await self.jobs.world.pass_time()
        self.message.free_at = now() + 1.0


class SimClaims:
    """Redis. Its clock is right by definition, and what must never happen to a claim is noted at once."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.held: dict[str, tuple[Claim, bytes, float, float, float]] = {}
        self.snapshot: dict[str, tuple[Claim, bytes, float, float, float]] = {}
        self.born = -1_000.0
        self.away_until = 0.0
        self.said: list[tuple[float, float]] = []

    def at(self, key: str) -> Look:
        found = self.held.get(key)
        if found is not None and found[4] <= now():
            found = None
            del self.held[key]
        claim, raw, until, written, _ = found or (None, b"", 0.0, 0.0, 0.0)
        base = BEGAN.timestamp()
        return Look(claim, raw, base + until, base + written, base + now(), base + self.born)

    def lose(self) -> None:
        """Redis begins anew, empty or as it was some time ago."""
        self.held = {} if self.world.rng.random() < 0.5 else dict(self.snapshot)
        self.born = now()

    async def look(self, key: str) -> Look:
        await self._ask(key)
        found = self.at(key)
        await self.world.pass_time()
        self.said.append((now(), found.born))
        return found

    def unbegun(self, key: str) -> Look | None:
        """By what one of the workers has heard at some time in the last minute."""
        of_late = [one for one in self.said if now() - one[0] < SAID_SECONDS_MAX]
        if not of_late:
            return None
        at, born = self.world.rng.choice(of_late)
        return Look(None, b"", 0.0, 0.0, BEGAN.timestamp() + at, born, assumed=True)

    async def put(
        self, key: str, expected: Look, claim: Claim, *, lease_seconds: float = 0, keep_seconds: float
    ) -> Look:
        await self._ask(key)
        if self.world.fault("claims", 0.03):
            late = self.world.rng.uniform(0.01, LATE_SECONDS)
            asyncio.get_running_loop().call_later(late, self._put, key, expected, claim, lease_seconds, keep_seconds)
            raise ClaimsUnavailable
        self._put(key, expected, claim, lease_seconds, keep_seconds)
        found = self.at(key)
        await self.world.pass_time()
        if self.world.fault("claims", 0.03):
            raise ClaimsUnavailable
        return found

    async def _ask(self, key: str) -> None:
        await self.world.pass_time()
        if now() < self.away_until:
            raise ClaimsUnavailable

    def _put(self, key: str, expected: Look, claim: Claim, lease_seconds: float, keep_seconds: float) -> None:
        found = self.at(key)
        if (found.raw, found.born) != (expected.raw, expected.born):
            return
        if (fault := self._forbidden(found.claim, claim)) is not None:
            self.world.found.append(f"{key}: {fault}")
        raw = msgspec.json.encode(claim) + b"%f" % (now() + lease_seconds)
        self.held[key] = (claim, raw, now() + lease_seconds, now(), now() + keep_seconds)

    @staticmethod
    def _forbidden(found: Claim | None, claim: Claim) -> str | None:
        """What is wrong with one claim taking the place of another."""
        if isinstance(found, Done) and claim != found:
            late_ok = isinstance(claim, Done) and claim.end == "sent" and found.end != "sent"
            return None if late_ok else f"{found.end} was followed by {claim}"
        if isinstance(found, Waiting) and isinstance(claim, Leased) and claim.attempt < found.attempt:
            return f"attempt {claim.attempt} began after it had failed"
        if isinstance(found, Leased) and isinstance(claim, Leased) and claim.attempt < found.attempt:
            return f"attempt {claim.attempt} began after attempt {found.attempt}"
        return None


class SimJournal:
    """RECEIPTS and DEAD-LETTERS, and `deliveries`, which lags."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.receipts: list[Receipt] = []
        self.stored_at: list[float] = []
        self.letters: set[str] = set()
        self.retired: set[str] = set()
        self.behind_until = 0.0
        self.refused = 0

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        def apply() -> None:
            self.receipts += receipts
            self.stored_at += [now()] * len(receipts)

        await self.world.write(apply)

    async def conclude(self, job: Job, done: Done) -> None:
        def apply() -> None:
            if done.end not in {"sent", "split"}:
                self.letters.add(job.key)
            if done.outcome is not None and done.outcome.kind == "target_invalid":
                self.retired.add(job.key)

        await self.world.write(apply)

    async def set_aside(self, job: Job, done: Done, payload: bytes) -> None:
        await self.conclude(job, done)

    async def ended(self, job: Job) -> Done | None:
        await self.world.ask_store()
        if now() < self.behind_until:
            self._refuse(job)
        folded = self.receipts[: bisect(self.stored_at, now() - self.world.rng.uniform(0, FOLD_LAG_SECONDS))]
        last = max(self.of(job.key, folded), key=rank_of, default=None)
        await self.world.pass_time()
        if last is None or last.state not in FINAL - {"ambiguous"}:
            return None
        return Done(last.attempt - 1, last.state, last.reason or "")  # type: ignore[arg-type]

    def _refuse(self, job: Job) -> None:
        """Who is refused leaves its place to others: it does not ask until it is answered."""
        self.refused += 1
        if (said := answered.get()) is not None:
            if "behind" in said:
                self.world.found.append(f"{job.key}: holds its place until `deliveries` answers")
            said.append("behind")
        raise StoreUnavailable("folded anew")

    def of(self, key: str, receipts: Sequence[Receipt] | None = None) -> list[Receipt]:
        return [one for one in (self.receipts if receipts is None else receipts) if key_of(one) == key]


def key_of(receipt: Receipt) -> str:
    return f"t/{receipt.id}/{receipt.user}/{receipt.channel}/{receipt.device}"


def rank_of(receipt: Receipt) -> tuple[int, float]:
    return rank(receipt.state, receipt.attempt), -receipt.at.timestamp()
