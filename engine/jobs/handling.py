"""One message of JOBS, from being handed out to being acknowledged. The order of the steps is the promise:

    look at the claim · decide again · wait for a turn · store that it may be a repetition · take the claim · send
    · record the outcome · receipts and what else follows · schedule the next try · acknowledge

A worker may die, or sleep for minutes, between any two of them. Whoever is handed the message next finds in the claim how far it
was, and goes on from there (ADR 0043).
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, Protocol

import structlog
from msgspec.structs import replace

from engine.channels.channel import Job, Outcome
from engine.jobs.claims import (
    CLAIM_CONFIRMED_SECONDS,
    LET_GO,
    Claim,
    Claims,
    ClaimsUnavailable,
    Done,
    End,
    Leased,
    Look,
    Waiting,
    kept_seconds,
    replaces,
)
from engine.jobs.life import AskDeliveries, Drop, Follow, Go, Poison, PutBack, judge
from engine.jobs.receipts import QUEUED, doubt_receipt, receipts_of
from engine.jobs.retry import RetryPolicy, in_milliseconds, settle
from engine.patience import patiently
from engine.tasks import end_if_cancelled
from seamark.protocol.errors import SeamarkError
from seamark.protocol.receipts import Receipt

_log = structlog.get_logger("seamark.worker")

SEND_SECONDS: Final = 30.0
"""How long a try may last: a receiver of webhooks has 15-30 s (Standard Webhooks), FCM wants at least 10 s."""

LEASE_SECONDS: Final = 45.0
"""How long a lease lasts: a try, and what the answer of the store and a busy loop may take before and after it."""

LOOKS_MAX: Final = 5
"""How often a claim is looked at that others change between look and lease, before its job is put back."""

CONTENDED_SECONDS: Final = 5.0

RECORD_PAUSES_SECONDS: Final = (0.1, 0.5, 2.0, 5.0)
"""How long an outcome waits for the store of claims. After that it is known from its receipt alone."""

assert LEASE_SECONDS > SEND_SECONDS, "a lease that runs out during a try makes a known outcome unknown"


class Send(NamedTuple):
    """It is to be sent: `rendered`, to `target`, whatever they are to the channel."""

    rendered: object
    target: object


class Hold(NamedTuple):
    """Not before `due`: a control, quiet hours, a cap. `stage`: what decides then; "": the same as now."""

    due: datetime
    why: str
    stage: str = ""


class Over(NamedTuple):
    """It is never sent. `outcome`: of rendering, where that has failed."""

    end: End
    why: str
    outcome: Outcome | None = None


class Split(NamedTuple):
    """It goes to several targets, each a job of its own."""

    jobs: Sequence[Job]


class Delivery(Protocol):
    """A job as it was handed out."""

    @property
    def job(self) -> Job: ...

    @property
    def deliveries(self) -> int:
        """How often, this time included."""

    async def ack(self) -> None:
        """Acknowledge; returns when the broker has said that it knows."""


class Queue(Protocol):
    """What is written into JOBS. Written twice it is there once or twice, and either is harmless."""

    async def schedule(self, job: Job, due: datetime) -> None:
        """Have the job handed out at `due`."""

    async def add(self, jobs: Sequence[Job]) -> None:
        """Have the jobs handed out: all of them or none."""


class NotNow(SeamarkError):
    """What is to follow cannot be done for `seconds`, and no other job may have to wait for it: the job is put back."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


class Journal(Protocol):
    """Where facts are stored, and what else an end leads to. Each may be done twice."""

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        """Store receipts of the job."""

    async def conclude(self, job: Job, done: Done) -> None:
        """The dead letter of an end without success, the token that is retired, the address that is suppressed.

        Raises:
            NotNow: not all of it can be done now; it is to be asked for again.
        """

    async def ended(self, job: Job) -> Done | None:
        """How the job has ended as far as `deliveries` knows; an end as `ambiguous` is none.

        Raises:
            StoreUnavailable: it does not answer, or does not know yet what was stored ten minutes ago.
        """


class Desk(Protocol):
    """What knows of users, controls and providers."""

    repeatable: bool
    """Whether the provider recognises what it is sent twice."""

    def slower(self, outcome: Outcome) -> float:
        """How much longer than usual a retry after this outcome waits: the budget of its provider is spent."""

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        """What is to be done with a job by what holds now: controls, expiry, cancels, preferences, suppressions."""

    async def turn(self, job: Job, send: Send) -> float:
        """Take a token; else in how many seconds to ask again, because the breaker is open or the bucket empty."""

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        """Try it."""


class Clock(Protocol):
    """The worker's clock: it may be wrong."""

    def now(self) -> datetime: ...


class Handler:
    """Does what is to be done with jobs of one channel."""

    def __init__(
        self, claims: Claims, queue: Queue, journal: Journal, desk: Desk, policy: RetryPolicy, clock: Clock
    ) -> None:
        self._claims = claims
        self._queue = queue
        self._journal = journal
        self._desk = desk
        self._policy = policy
        self._clock = clock

    async def handle(self, delivery: Delivery) -> None:
        """Bring a job as far as it can be brought now, and acknowledge its message.

        Raises:
            BrokerError, StoreUnavailable: something is wrong that does not pass by itself. The message is handed out again.
        """
        job, owner = delivery.job, secrets.token_hex(8)
        for _ in range(LOOKS_MAX):
            look = await self._look(job)
            step = judge(job, delivery.deliveries, look, owner, asked=False, ended=None)
            if isinstance(step, AskDeliveries):
                ended = await patiently(self._journal.ended, job, seconds=math.inf)
                step = judge(job, delivery.deliveries, look, owner, asked=True, ended=ended)
            match step:
                case Follow(claim):
                    return await self._follow(delivery, claim)
                case Drop():
                    return await self._ack(delivery)
                case PutBack(seconds, _):
                    return await self._put_back(delivery, seconds)
                case Poison(doubtful):
                    done = Done(job.attempt, "ambiguous" if doubtful else "failed", "poison")
                    if await self._conclude(delivery, look, done):
                        return None
                case Go():
                    if await self._go(delivery, look, step, owner):
                        return None
            end_if_cancelled()
        return await self._put_back(delivery, CONTENDED_SECONDS)

    async def hand_back(self, delivery: Delivery) -> None:
        """Leave a job that was not begun to another worker."""
        job, look = delivery.job, await self._look(delivery.job)
        if look is not None:
            step = judge(job, delivery.deliveries, look, "", asked=False, ended=None)
            job = _untried(job, look, step) if isinstance(step, Go) else job
        await self._put_back_until(delivery, job, self._clock.now())

    async def _look(self, job: Job) -> Look | None:
        try:
            return await self._claims.look(job.claim_key)
        except ClaimsUnavailable:
            return None

    # --- before the first byte ---------------------------------------------------------------------------------------

    async def _go(self, delivery: Delivery, look: Look | None, go: Go, owner: str) -> bool:
        """Decide again; if it is still to be sent and it is its turn, try it. Whether nothing is left to do with it."""
        job = delivery.job
        if look is not None:
            job = _untried(job, look, go)
        decided = await patiently(self._desk.decide, job, seconds=math.inf)
        if isinstance(decided, Hold):
            await self._put_back_until(delivery, replace(job, stage=decided.stage or job.stage), decided.due)
            return True
        if not isinstance(decided, Send) or self._must_not_repeat(job, go):
            return await self._conclude(delivery, look, await self._end(job, go, decided))
        seconds = await self._desk.turn(job, decided)
        if seconds > 0:
            await self._put_back_until(delivery, job, self._clock.now() + timedelta(seconds=seconds))
            return True
        if go.doubt is not None:
            # Before the claim: nothing may come between the lease and the first byte. If it comes to no try, too much was said.
            await self._store(job, [doubt_receipt(job, go.doubt, self._clock.now())])
        return await self._try(delivery, look, Leased(job.attempt, owner, go.lost, go.doubtful), decided)

    def _must_not_repeat(self, job: Job, go: Go) -> bool:
        """Whether this try could be one too many: the provider may have it already, or it was tried often enough."""
        if go.doubt is None:
            return False
        return not self._repeatable(job) or job.attempt + go.lost >= self._policy.tries_max

    def _repeatable(self, job: Job) -> bool:
        return job.semantics == "at_least_once" or self._desk.repeatable

    async def _end(self, job: Job, go: Go, decided: Send | Over | Split) -> Done:
        """How a job ends that is not tried now."""
        if isinstance(decided, Split):
            await patiently(self._queue.add, [replace(each, again=True) for each in decided.jobs], seconds=math.inf)
            return Done(job.attempt, "split")
        if go.doubtful:
            return Done(job.attempt, "ambiguous", go.doubt or "doubt")
        assert isinstance(decided, Over), "without a doubt nothing forbids a try"
        return Done(job.attempt, decided.end, decided.why, decided.outcome)

    async def _conclude(self, delivery: Delivery, look: Look | None, done: Done) -> bool:
        """End a job without a try, by its claim, so that no other worker sends it any more. Whether that was possible."""
        if look is None:
            await self._put_back(delivery, CONTENDED_SECONDS)
            return True
        try:
            stored = await self._claims.put(
                delivery.job.claim_key, look, done, keep_seconds=kept_seconds(done, self._clock.now())
            )
        except ClaimsUnavailable:
            return False
        if stored.claim != done:
            return False
        await self._follow(delivery, done)
        return True

    # --- the try -----------------------------------------------------------------------------------------------------

    async def _try(self, delivery: Delivery, look: Look | None, lease: Leased, send: Send) -> bool:
        """Take the claim, send, record. Whether nothing is left to do with the message."""
        job, asked_at = delivery.job, time.monotonic()
        if look is not None:
            try:
                keep_seconds = kept_seconds(lease, self._clock.now())
                look = await self._claims.put(
                    job.claim_key, look, lease, lease_seconds=LEASE_SECONDS, keep_seconds=keep_seconds
                )
            except ClaimsUnavailable:
                return False
            if look.claim != lease:
                return False
        if time.monotonic() - asked_at > LEASE_SECONDS - SEND_SECONDS:
            # The lease could run out during the try. It was not begun, so it costs no attempt, and leaves no doubt.
            due = in_milliseconds(self._clock.now())
            said: Waiting | Done = Waiting(lease.attempt, due, job.tried_at, None, lease.lost, lease.doubt)
        else:
            outcome = await self._desk.send(job, send, deadline_seconds=SEND_SECONDS)
            ended_at, draw = self._clock.now(), random.random()
            said = settle(
                job,
                lease,
                outcome,
                self._policy,
                ended_at,
                draw,
                repeatable=self._repeatable(job),
                slower=self._desk.slower(outcome),
            )
        claim, last = await self._record(job, look, said, lease)
        fresh = claim is said and not (isinstance(claim, Waiting) and claim.attempt == job.attempt)
        await self._follow(delivery, claim, last, fresh=fresh)
        return True

    async def _record(
        self, job: Job, look: Look | None, said: Waiting | Done, lease: Leased
    ) -> tuple[Claim, Look | None]:
        """Store what follows from a try; what is stored then, or `said` itself while the store is away."""
        for pause in (*RECORD_PAUSES_SECONDS, 0):
            try:
                look = look if look is not None else await self._claims.look(job.claim_key)
                for _ in range(LOOKS_MAX):
                    wanted = replaces(said, look.claim, lease)
                    if wanted is None:
                        assert look.claim is not None, "anything may take the place of nothing"
                        return look.claim, look
                    keep_seconds = kept_seconds(wanted, self._clock.now())
                    look = await self._claims.put(job.claim_key, look, wanted, keep_seconds=keep_seconds)
                    if look.claim == wanted:
                        return said if wanted == said else wanted, look
            except ClaimsUnavailable:
                look = None
            await asyncio.sleep(pause)
        _log.warning("outcome_not_recorded", channel=job.channel)
        return said, None

    # --- what follows ------------------------------------------------------------------------------------------------

    async def _follow(self, delivery: Delivery, claim: Claim, look: Look | None = None, *, fresh: bool = False) -> None:
        """Do what follows from a claim, and acknowledge. `fresh`: nobody else can have done so.

        The acknowledgement is last: whatever is done before it is done again if this worker dies in between.
        """
        job = delivery.job
        if isinstance(claim, Leased):
            # Somebody else is at it, perhaps by this very message: if he dies, nobody would be left.
            await self._put_back(delivery, CONTENDED_SECONDS)
            return
        receipts = receipts_of(job, claim, self._clock.now())
        # That it waits is said once it does: the end of an attempt that never came to be would be hidden by it.
        await self._store(job, [one for one in receipts if one.state != QUEUED])
        if isinstance(claim, Waiting):
            next_try = replace(
                job, attempt=claim.attempt, tried_at=claim.tried_at, stage="retry", again=job.again or not fresh
            )
            await patiently(self._queue.schedule, next_try, claim.due, seconds=math.inf)
            await self._store(job, [one for one in receipts if one.state == QUEUED])
        else:
            try:
                await patiently(self._journal.conclude, job, claim, seconds=math.inf)
            except NotNow as error:
                await self._put_back(delivery, error.seconds)
                return
        await self._ack(delivery)
        if fresh and isinstance(claim, Done):
            await self._let_go(delivery, look, claim)

    async def _let_go(self, delivery: Delivery, look: Look | None, done: Done) -> None:
        """Keep the claim of a campaign's job for a short while only, if no other message of the job can exist."""
        job = delivery.job
        alone = delivery.deliveries == 1 and not job.again and job.attempt == 0
        if job.lane != LET_GO or not alone or look is None:
            return
        try:
            await self._claims.put(job.claim_key, look, done, keep_seconds=CLAIM_CONFIRMED_SECONDS)
        except ClaimsUnavailable:
            return  # then it stays for as long as the others

    async def _store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        if receipts:
            await patiently(self._journal.store, job, receipts, seconds=math.inf)

    async def _put_back(self, delivery: Delivery, seconds: float) -> None:
        await self._put_back_until(delivery, delivery.job, self._clock.now() + timedelta(seconds=seconds))

    async def _put_back_until(self, delivery: Delivery, job: Job, due: datetime) -> None:
        """Hand the job back: by a schedule, never by refusing the message, whose deliveries count crashes."""
        await patiently(self._queue.schedule, replace(job, again=True), in_milliseconds(due), seconds=math.inf)
        await self._ack(delivery)

    async def _ack(self, delivery: Delivery) -> None:
        await patiently(delivery.ack, seconds=math.inf)


def _untried(job: Job, look: Look, go: Go) -> Job:
    """The job as it is put back, if it is: its message says that nobody had begun this attempt when its claim was looked at.

    So it is not taken for one that was forgotten, however often it is put back.
    """
    return job if go.doubt is not None else replace(job, untried_at=datetime.fromtimestamp(look.now, UTC))
