"""One message of JOBS, from being handed out to being acknowledged. The order of the steps is the promise:

    look at the claim · decide again · wait for a turn · store that it may be a repetition · take the claim · send
    · record the outcome · dead letter, retired target · receipts · schedule the next try · acknowledge

Where nobody can have begun the job, as with nearly all, its claim is not looked at: to take it shows whether that is true
(ADR 0052).

A worker may die, or sleep for minutes, between any two of them. Whoever is handed the message next finds in the claim how far it
was, and goes on from there (ADR 0043).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import secrets
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import structlog
from msgspec.structs import replace

from engine import failpoints
from engine.channels.channel import Job
from engine.errors import BrokerError, StoreUnavailable
from engine.jobs.claims import (
    CLAIM_CONFIRMED_SECONDS,
    LET_GO,
    Claim,
    Claims,
    ClaimsUnavailable,
    Done,
    Leased,
    Look,
    Waiting,
    kept_seconds,
    replaces,
)
from engine.jobs.desk import Clock, Delivery, Desk, Hold, Journal, NotNow, Queue, Send
from engine.jobs.digests import next_round, with_members
from engine.jobs.life import (
    STORE_AWAY_SECONDS,
    AskDeliveries,
    Drop,
    Follow,
    Go,
    Poison,
    PutBack,
    end_of,
    judge,
    may_be_shared,
    seen_untried,
)
from engine.jobs.messages import Unreadable
from engine.jobs.receipts import QUEUED, doubt_receipts, receipts_of
from engine.jobs.retry import RetryPolicy, in_milliseconds, put_back_seconds, settle
from engine.jobs.splitting import parts_of
from engine.patience import passes, patiently
from engine.tasks import end_if_cancelled
from seamark.protocol.receipts import Receipt

_log = structlog.get_logger("seamark.worker")

SEND_SECONDS: Final = 30.0
"""How long a try may last: a receiver of webhooks has 15-30 s (Standard Webhooks), FCM wants at least 10 s."""

LEASE_SECONDS: Final = 45.0
"""How long a lease lasts: a try, and what the answer of the store and a busy loop may take before and after it."""

LOOKS_MAX: Final = 5
"""How often others may change a claim between look and lease, before its job is put back."""

CONTENDED_SECONDS: Final = 5.0

RECEIPTS_AT_ONCE: Final = 500
"""A digest may have thousands of members. So many receipts are one batch."""

RECORD_PAUSES_SECONDS: Final = (0.1, 0.5, 2.0, 5.0)
"""How long an outcome waits for the store of claims. After that it is known from its receipt alone."""

assert LEASE_SECONDS > SEND_SECONDS, "a lease that runs out during a try makes a known outcome unknown"


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
        self._name, self._handled = secrets.token_hex(8), itertools.count()

    async def handle(self, delivery: Delivery) -> None:
        """Bring a job as far as it can be brought now, and acknowledge its message.

        Raises:
            BrokerError, StoreUnavailable: something is wrong that does not pass by itself. The message is handed out again.
        """
        job, owner = delivery.job, f"{self._name}-{next(self._handled):x}"
        for number in range(LOOKS_MAX):
            look = (None if number else self._unbegun(delivery)) or await self._look(job)
            step = judge(job, delivery.deliveries, look, owner, held_seconds=delivery.held_seconds)
            if isinstance(step, AskDeliveries):
                try:
                    ended = await self._journal.ended(job)
                except (BrokerError, StoreUnavailable) as error:
                    if not passes(error):
                        raise
                    # They may be folded anew for hours. Whoever needs no answer must not wait for those who do.
                    pause = put_back_seconds(job.put_backs, STORE_AWAY_SECONDS, random.random())
                    return await self._put_back(delivery, pause)
                held_seconds = delivery.held_seconds
                step = judge(job, delivery.deliveries, look, owner, held_seconds=held_seconds, asked=True, ended=ended)
            match step:
                case Follow(claim):
                    return await self._follow(delivery, claim)
                case Drop():
                    return await self._ack(delivery)
                case PutBack(seconds, _):
                    return await self._put_back(delivery, seconds)
                case Poison(doubtful):
                    members = None if look is None else with_members(job, look.claim).members
                    done = Done(job.attempt, "ambiguous" if doubtful else "failed", "poison", members=members)
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
            step = judge(job, delivery.deliveries, look, "", held_seconds=delivery.held_seconds)
            job = seen_untried(job, look, step) if isinstance(step, Go) else job
        await self._put_back_until(delivery, job, self._clock.now())

    async def set_aside(self, unreadable: Unreadable) -> None:
        """End what cannot be read: with a dead letter that keeps it, and receipts, as far as they can be told.

        Done again it says the same. What has a claim may have been sent by a worker that could read it.

        Raises:
            NotNow: as of `Journal.set_aside`. BrokerError, StoreUnavailable: not all of it is done.
        """
        job, look = unreadable.job, await self._look(unreadable.job)
        done = Done(job.attempt, "failed" if look is not None and look.claim is None else "ambiguous", "poison")
        await self._journal.set_aside(job, done, unreadable.payload)
        if job.id:
            await self._store(job, receipts_of(job, done, self._clock.now()))

    def _unbegun(self, delivery: Delivery) -> Look | None:
        """What stands in place of a look where nobody else can have had the job; None: it has to be looked at."""
        job = delivery.job
        if job.attempt > 0 or may_be_shared(job, delivery.deliveries, delivery.held_seconds):
            return None
        return self._claims.unbegun(job.claim_key)

    async def _look(self, job: Job) -> Look | None:
        try:
            return await self._claims.look(job.claim_key)
        except ClaimsUnavailable:
            return None

    # --- before the first byte ---------------------------------------------------------------------------------------

    async def _go(self, delivery: Delivery, look: Look | None, go: Go, owner: str) -> bool:
        """Decide again; if it is still to be sent and it is its turn, try it. Whether nothing is left to do with it."""
        job = delivery.job
        if look is not None and not look.assumed:
            job = with_members(seen_untried(job, look, go), look.claim)
        decided = await patiently(self._desk.decide, job, seconds=math.inf)
        if isinstance(decided, Hold):
            return await self._hold(delivery, look, replace(job, stage=decided.stage or job.stage), decided.due)
        if not isinstance(decided, Send) or self._must_not_repeat(job, go):
            if look is not None and not may_be_shared(job, delivery.deliveries, delivery.held_seconds):
                # Of a split the parts are new messages. A young store that has no claim for them is believed only if they say
                # `untried_at`, so it is noted here.
                job = seen_untried(job, look, go)
            return await self._conclude(delivery, look, end_of(job, go, decided))
        seconds = await self._desk.turn(job, decided)
        if seconds > 0:
            return await self._hold(delivery, look, job, self._clock.now() + timedelta(seconds=seconds))
        if go.doubt is not None:
            # Before the claim: nothing may come between the lease and the first byte. If it comes to no try, too much was said.
            await self._store(job, doubt_receipts(replace(job, members=decided.members), go.doubt, self._clock.now()))
        lease = Leased(job.attempt, owner, go.lost, go.doubtful, decided.members)
        return await self._try(delivery, look, lease, decided)

    async def _hold(self, delivery: Delivery, look: Look | None, job: Job, due: datetime) -> bool:
        """Put a job back that is not to be sent now. Whether nothing is left to do with it.

        Its claim is looked at first, if it was not. If it was held so long that others may have had it, it proves nothing that
        there is no claim: the store may have lost it, or let go of it. Then the job is judged anew, by a look.
        """
        if look is not None and look.assumed:
            look = await self._look(job)
            if look is None or look.claim is not None:
                return False
            if may_be_shared(job, delivery.deliveries, delivery.held_seconds):
                return False
            job = seen_untried(job, look, Go())
        await self._put_back_until(delivery, job, due)
        return True

    def _must_not_repeat(self, job: Job, go: Go) -> bool:
        """Whether this try could be one too many: the provider may have it already, or it was tried often enough."""
        if go.doubt is None:
            return False
        return not self._repeatable(job) or job.attempt + go.lost >= self._policy.tries_max

    def _repeatable(self, job: Job) -> bool:
        return job.semantics == "at_least_once" or self._desk.repeatable

    async def _conclude(self, delivery: Delivery, look: Look | None, done: Done) -> bool:
        """End a job without a try, by its claim, so that no other worker sends it any more. Whether that was possible."""
        if look is None:
            if done.end == "split":
                # Its parts are made without a claim. Put back, it would be split anew every few seconds, and once more when
                # claims are back: whatever was sent without a claim meanwhile would be sent again.
                await self._follow(delivery, done)
            else:
                await self._put_back(delivery, CONTENDED_SECONDS)
            return True
        try:
            stored = await self._claims.put(
                delivery.job.claim_key, look, done, keep_seconds=kept_seconds(done, self._clock.now)
            )
        except ClaimsUnavailable:
            return False
        if stored.claim != done:
            return False
        await self._follow(delivery, done, fresh=True)
        return True

    # --- the try -----------------------------------------------------------------------------------------------------

    async def _try(self, delivery: Delivery, look: Look | None, lease: Leased, send: Send) -> bool:
        """Take the claim, send, record. Whether nothing is left to do with the message."""
        job, asked_at = delivery.job, time.monotonic()
        if look is not None:
            try:
                keep_seconds = kept_seconds(lease, self._clock.now)
                look = await self._claims.put(
                    job.claim_key, look, lease, lease_seconds=LEASE_SECONDS, keep_seconds=keep_seconds
                )
            except ClaimsUnavailable:
                look = None
            if look is None or look.claim != lease:
                self._desk.unused(send)
                return False
        failpoints.reach("after-lease")
        if time.monotonic() - asked_at > LEASE_SECONDS - SEND_SECONDS:
            # The lease could run out during the try. It was not begun, so it costs no attempt, and leaves no doubt.
            self._desk.unused(send)
            due = in_milliseconds(self._clock.now())
            said: Waiting | Done = Waiting(
                lease.attempt, due, job.tried_at, None, lease.lost, lease.doubt, lease.members
            )
        else:
            tried = job if lease.members is job.members else replace(job, members=lease.members)
            outcome = await self._desk.send(tried, send, deadline_seconds=SEND_SECONDS)
            ended_at, repeatable, slower = self._clock.now(), self._repeatable(job), self._desk.slower(outcome)
            said = settle(
                job, lease, outcome, self._policy, ended_at, random.random(), repeatable=repeatable, slower=slower
            )
        failpoints.reach("after-send")
        claim, last = await self._record(job, look, said, lease)
        failpoints.reach("after-record")
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
                    keep_seconds = kept_seconds(wanted, self._clock.now)
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
        if isinstance(claim, Leased):
            # Somebody else is at it, perhaps by this very message: if he dies, nobody would be left.
            await self._put_back(delivery, CONTENDED_SECONDS)
        elif isinstance(claim, Waiting):
            await self._follow_waiting(delivery, claim, fresh=fresh)
        else:
            await self._follow_done(delivery, claim, look, fresh=fresh)

    async def _follow_waiting(self, delivery: Delivery, waiting: Waiting, *, fresh: bool) -> None:
        job = delivery.job
        receipts = receipts_of(job, waiting, self._clock.now())
        # That it waits is said once it does: the end of an attempt that never came to be would be hidden by it.
        await self._store(job, [one for one in receipts if one.state != QUEUED])
        next_try = replace(
            with_members(job, waiting),
            attempt=waiting.attempt,
            tried_at=waiting.tried_at,
            stage="retry",
            again=job.again or not fresh,
            put_backs=job.put_backs + 1 if waiting.attempt == job.attempt else 0,
        )
        await patiently(self._queue.schedule, next_try, waiting.due, seconds=math.inf)
        await self._store(job, [one for one in receipts if one.state == QUEUED])
        await self._ack(delivery)

    async def _follow_done(self, delivery: Delivery, done: Done, look: Look | None, *, fresh: bool) -> None:
        job, later_seconds = with_members(delivery.job, done), 0.0
        # The end is told last: then one that is told has its dead letter.
        try:
            await patiently(self._journal.conclude, job, done, seconds=math.inf)
        except NotNow as error:
            later_seconds = error.seconds
        await self._store(job, receipts_of(job, done, self._clock.now()))
        failpoints.reach("after-receipts")
        if parts := parts_of(job, done):
            await patiently(self._queue.add, parts, seconds=math.inf)
        if job.digest:
            await self._follow_digest(job, done, fresh=fresh)
        if later_seconds:
            await self._put_back(delivery, later_seconds)
            return
        await self._ack(delivery)
        if fresh:
            await self._let_go(delivery, look, done)

    async def _follow_digest(self, job: Job, done: Done, *, fresh: bool) -> None:
        """Schedule the job that asks for what is left of a digest's window. The receipts of this one are stored by now."""
        now = in_milliseconds(self._clock.now())
        if (another := next_round(job, done, now, fresh=fresh)) is not None:
            await patiently(self._queue.schedule, another, now, seconds=math.inf)

    async def _let_go(self, delivery: Delivery, look: Look | None, done: Done) -> None:
        """Keep the claim of a campaign's job for a short while only, if no other message of the job can exist."""
        job = delivery.job
        shared = may_be_shared(job, delivery.deliveries, delivery.held_seconds)
        if job.lane != LET_GO or shared or job.attempt > 0 or look is None:
            return
        try:
            await self._claims.put(job.claim_key, look, done, keep_seconds=CLAIM_CONFIRMED_SECONDS)
        except ClaimsUnavailable:
            return  # then it stays for as long as the others

    async def _store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        for begin in range(0, len(receipts), RECEIPTS_AT_ONCE):
            some = receipts[begin : begin + RECEIPTS_AT_ONCE]
            await patiently(self._journal.store, job, some, seconds=math.inf)
            failpoints.reach("after-some-receipts")

    async def _put_back(self, delivery: Delivery, seconds: float) -> None:
        await self._put_back_until(delivery, delivery.job, self._clock.now() + timedelta(seconds=seconds))

    async def _put_back_until(self, delivery: Delivery, job: Job, due: datetime) -> None:
        """Hand the job back: by a schedule, never by refusing the message, whose deliveries count crashes."""
        job = replace(job, again=True, put_backs=job.put_backs + 1)
        await patiently(self._queue.schedule, job, in_milliseconds(due), seconds=math.inf)
        await self._ack(delivery)

    async def _ack(self, delivery: Delivery) -> None:
        failpoints.reach("before-ack")
        # If it is lost, it is as if the worker had died before: the message comes again, and its claim says what is left to do.
        # A job whose claim is let go of must not come again.
        await patiently(delivery.ack, delivery.job.lane == LET_GO, seconds=math.inf)
