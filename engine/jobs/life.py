"""What a worker has to do with a job that it was handed, by what its claim says. Pure, and total: every claim has an answer.

The claim is looked at first and taken last. In between the worker decides again and waits for its turn at the provider, which may
take long; a lease that was taken before would run out, and a job that was never sent would look like one that perhaps was.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

from msgspec.structs import replace

from engine.channels.channel import Job
from engine.jobs.claims import Done, Leased, Look, Waiting, believable, may_be_let_go
from engine.jobs.desk import Over, Send, Split

DELIVERIES_MAX: Final = 5
"""A message that was handed out this often without an outcome has probably crashed its workers. Handed out once more, it is not
tried but ended as poison. Whatever is put back is acknowledged and scheduled anew, so only crashes count."""

ALONE_SECONDS: Final = 10.0
"""So soon after it was handed out nobody else has a message. The broker waits for a minute, but a new leader may forget what was
handed out."""

Doubt = Literal["lease_lost", "forgotten", "unclaimed"]
"""Why an earlier try may have been taken by the provider: who tried it is gone; the store of claims has lost its past; or the
store was away, and it is tried without a claim."""


class Follow(NamedTuple):
    """Do again all that follows from this claim, then acknowledge: whoever wrote it may have died before he had done it."""

    claim: Waiting | Done


class Drop(NamedTuple):
    """Acknowledge: another message has a later attempt of this job, and it is being worked on."""


class PutBack(NamedTuple):
    """Not now: schedule the same job again, then acknowledge."""

    seconds: float
    why: str


class AskDeliveries(NamedTuple):
    """Only `deliveries` can tell whether the job has ended already."""


class Go(NamedTuple):
    """Decide again, wait for a turn, take the claim, send.

    Args:
        doubt: why an earlier try may have been taken; none: there was no such try. It is stored before the job is sent again.
        lost, doubtful: what the lease goes on from.
    """

    doubt: Doubt | None = None
    lost: int = 0
    doubtful: bool = False


class Poison(NamedTuple):
    """End it. `doubtful`: it may have been sent."""

    doubtful: bool


Step = Follow | Drop | PutBack | AskDeliveries | Go | Poison


def judge(
    job: Job,
    deliveries: int,
    look: Look | None,
    owner: str,
    *,
    held_seconds: float,
    asked: bool = False,
    ended: Done | None = None,
) -> Step:
    """What to do with a job.

    Args:
        deliveries: how often its message was handed out, this time included.
        look: its claim; none: the store is away.
        owner: who asks.
        held_seconds: how long ago, at most, it was handed out.
        asked, ended: whether `deliveries` was asked, and the end that it shows.
    """
    shared = may_be_shared(job, deliveries, held_seconds)
    if look is None:
        return _unclaimed(job, deliveries, ask=shared and not asked, ended=ended)
    claim = look.claim
    if isinstance(claim, Done) or (isinstance(claim, Waiting) and job.attempt < claim.attempt):
        return Follow(claim)
    if isinstance(claim, Leased):
        step = _leased(job, claim, look, owner)
        if step is not None:
            return step
    forgotten = shared and not believable(look, job)
    if forgotten or (shared and may_be_let_go(look, job)):
        if not asked:
            return AskDeliveries()
        if ended is not None:
            return Follow(ended)
    lost_lease = isinstance(claim, Leased) and claim.owner != owner and claim.attempt == job.attempt
    doubt: Doubt | None = "lease_lost" if lost_lease else "forgotten" if forgotten else None
    lost = (claim.lost if claim is not None else 0) + (doubt is not None)
    doubtful = doubt is not None or (claim is not None and claim.doubt)
    if deliveries > DELIVERIES_MAX:
        return Poison(doubtful)
    return Go(doubt, lost, doubtful)


def may_be_shared(job: Job, deliveries: int, held_seconds: float) -> bool:
    """Whether somebody else may have worked on this attempt. What he left behind may be gone: lost with the store, or let go.

    A digest has another message for each record that was planned late: by what that one finds its digest may have begun.
    """
    return job.digest != "" or deliveries > 1 or job.again or held_seconds > ALONE_SECONDS


def end_of(job: Job, go: Go, decided: Send | Over | Split) -> Done:
    """How a job ends that is not tried now."""
    if isinstance(decided, Split):
        # The claim settles the parts before they are made: whoever does this again may find others, or decide to send nothing.
        return Done(job.attempt, "split", members=decided.members, targets=decided.targets, untried_at=job.untried_at)
    members = decided.members or job.members
    if go.doubtful:
        return Done(job.attempt, "ambiguous", go.doubt or "doubt", members=members)
    assert isinstance(decided, Over), "without a doubt nothing forbids a try"
    return Done(job.attempt, decided.end, decided.why, decided.outcome, members)


def seen_untried(job: Job, look: Look, go: Go) -> Job:
    """The job with `untried_at` set to when its claim was looked at: nobody had begun this attempt by then.

    Unchanged where there is a doubt.

    A message that says so is not taken for one that the store has forgotten (`believable`), however often it is put back.
    """
    return job if go.doubt is not None else replace(job, untried_at=datetime.fromtimestamp(look.now, UTC))


def _unclaimed(job: Job, deliveries: int, *, ask: bool, ended: Done | None) -> Step:
    """The store is away. Those that must not be sent twice wait; the others go on, and that they did is stored first.

    A digest waits, too: nobody would know what was in it.
    """
    if job.semantics != "at_least_once" or job.digest:
        return PutBack(STORE_AWAY_SECONDS, "claims_away")
    if ask:
        return AskDeliveries()
    if ended is not None:
        return Follow(ended)
    return Poison(doubtful=True) if deliveries > DELIVERIES_MAX else Go("unclaimed", 1, doubtful=True)


def _leased(job: Job, claim: Leased, look: Look, owner: str) -> Step | None:
    """What a lease says; None: it is this worker's own, or has run out."""
    if claim.attempt > job.attempt:
        return Drop()
    if claim.owner != owner and look.now < look.until:
        return PutBack(look.until - look.now + LEASE_MARGIN_SECONDS, "busy")
    return None


STORE_AWAY_SECONDS: Final = 10.0
"""How long a job waits for the store of claims before it is looked at again: a fail-over of Redis takes 5-15 s."""

LEASE_MARGIN_SECONDS: Final = 1.0
"""How long after somebody else's lease it is looked at again."""
