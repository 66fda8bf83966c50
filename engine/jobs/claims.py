"""Claims of jobs: what has become of a job, kept where all workers look before they send, and by what rule it changes.

    absent ──▶ leased ──▶ waiting ──▶ leased ──▶ … ──▶ done

A *lease* is taken right before the first byte leaves, and is longer than a try may last. *Waiting* and *done* hold the whole
outcome of the last try, because everything else follows from it: receipts, dead letters, the schedule of the next try. So whoever
finds them can finish what a worker that died has left undone. A lease that has run out says that nobody knows how
the try has ended.

Here is what claims say and which may follow which, without I/O. `RedisClaims` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from engine.channels.channel import Job, Members, Outcome
from seamark.protocol.errors import SeamarkError

CLAIM_KEPT_SECONDS: Final = 72 * 3600.0
"""How long a claim is kept after its last change, or after it is due: the deduplication horizon of events."""

CLAIM_HORIZON_SECONDS: Final = 71 * 3600.0
"""A job that was made longer ago may have outlived its claim. An hour less than claims are kept: clocks of hosts disagree."""

CLOCKS_SECONDS: Final = 60.0
"""How far the clocks of planners and of the store may be apart."""

CLAIM_CONFIRMED_SECONDS: Final = 15 * 60.0
"""How long the claim of an ended job is kept if no other message of it can exist: a campaign of millions must not fill Redis."""

LET_GO: Final = "bulk"
"""The lane whose ended jobs are let go of: campaigns. Beyond that time `deliveries` knows how they have ended."""

End = Literal["sent", "failed", "suppressed", "expired", "cancelled", "ambiguous", "split"]
"""How jobs end. `ambiguous`: it may have been sent, and nobody can tell any more; `split`: into a job for each target."""


class ClaimsUnavailable(SeamarkError):
    """Redis did not answer in time: nobody knows what has become of the job, and what was to be changed may be changed."""


class Leased(msgspec.Struct, frozen=True, tag="leased", omit_defaults=True):
    """A worker tries the job now, or has died trying.

    Args:
        attempt: as the job says.
        owner: which handling of a message took it: each has another owner.
        lost: how many leases of this job have run out: tries that `attempt` does not count.
        doubt: an earlier try may have been taken by the provider.
        members: of a digest, what is in it: from the first try on, each has the same.
    """

    attempt: int
    owner: str
    lost: int = 0
    doubt: bool = False
    members: Members | None = None


class Waiting(msgspec.Struct, frozen=True, tag="waiting", omit_defaults=True):
    """It is tried again at `due`, as attempt `attempt`: a schedule in JOBS says the same, or is to be written.

    Args:
        outcome: of the try before; none: there was no try, the lease was given back.
        tried_at: when the job was first tried.
        lost, doubt, members: as `Leased` has them.
    """

    attempt: int
    due: datetime
    tried_at: datetime | None = None
    outcome: Outcome | None = None
    lost: int = 0
    doubt: bool = False
    members: Members | None = None


class Done(msgspec.Struct, frozen=True, tag="done", omit_defaults=True):
    """It has ended.

    Args:
        attempt: the try that ended it; the same as before where it ended without one.
        end: how.
        why: the reason, as receipts say it.
        outcome: of the try; none: it ended without one.
        members: as `Leased` has them.
        targets: of a job that was split, what into.
        untried_at: of a job that was split, when it was last seen that nobody had begun it.
    """

    attempt: int
    end: End
    why: str = ""
    outcome: Outcome | None = None
    members: Members | None = None
    targets: tuple[str, ...] = ()
    untried_at: datetime | None = None


Claim = Leased | Waiting | Done


class Look(NamedTuple):
    """A claim as it was found. Times are seconds of the store's clock, so that no worker's clock has a say.

    Args:
        claim: None: there is none.
        raw: its stored form, by which it is recognised when it is to be replaced.
        until: when the lease runs out.
        written: when it was written.
        now: when it was looked at.
        born: since when the store has kept everything it was told. What was written before may have been lost.
        assumed: nobody has looked; it is what `Claims.unbegun` supposes.
    """

    claim: Claim | None
    raw: bytes
    until: float
    written: float
    now: float
    born: float
    assumed: bool = False


class Claims(Protocol):
    """Where claims are kept."""

    async def look(self, key: str) -> Look:
        """The claim of a job.

        Raises:
            ClaimsUnavailable: the store does not answer.
        """

    def unbegun(self, key: str) -> Look | None:
        """What a look would have said a moment ago of a job that nobody had begun; None: the store has said nothing of late.

        What is put in its place is stored only if there is still no claim, and the store has lost nothing since that moment.
        """

    async def put(
        self, key: str, expected: Look, claim: Claim, *, lease_seconds: float = 0, keep_seconds: float
    ) -> Look:
        """Store `claim` if `expected` is still what is stored, in the same store; what is stored then.

        Raises:
            ClaimsUnavailable: the store does not answer; it may be stored.
        """


def believable(look: Look, job: Job) -> bool:
    """Whether what was found says what happened last. A store that has lost its data, or went back, says what it still knows.

    That there is no claim is believed of a store that has lost nothing since the job was known to be untried, and no longer ago
    than claims are kept.
    """
    if look.claim is not None:
        return look.written >= look.born
    # The one is of the store's clock, to the microsecond, the other of a planner's.
    apart = -0.001 if job.untried_at is not None else CLOCKS_SECONDS
    untried = _untried_since(job)
    return untried > look.born + apart and look.now - untried < CLAIM_HORIZON_SECONDS


def may_be_let_go(look: Look, job: Job) -> bool:
    """Whether there is no claim, and there may have been one of a job that has ended and was thought to have no other message."""
    return (
        look.claim is None
        and job.lane == LET_GO
        and look.now - _untried_since(job) > CLAIM_CONFIRMED_SECONDS - CLOCKS_SECONDS
    )


def _untried_since(job: Job) -> float:
    return (job.untried_at or job.first_at).timestamp()


def replaces(new: Waiting | Done, found: Claim | None, lease: Leased) -> Waiting | Done | None:
    """What is stored when the try under `lease` has ended; None: `found` stays, and what follows from it counts.

    That a provider took it is recorded whoever says so, unless that is known already: a worker may have lost its lease while it
    was waiting for the answer. Anything else may be said by who holds the lease, or where nobody has gone on from this try since:
    for another worker may have sent it meanwhile.
    """
    if found is None:
        return new
    if isinstance(new, Done) and new.end == "sent":
        if isinstance(found, Done):
            # In `deliveries` the later attempt wins, and this end has to. The other may have been told with either attempt.
            after = max(found.attempt, lease.attempt) + 1
            return None if found.end == "sent" else msgspec.structs.replace(new, attempt=after)
        return new if new.attempt >= found.attempt else msgspec.structs.replace(new, attempt=found.attempt)
    match found:
        case Leased(attempt, owner):
            return new if owner == lease.owner or attempt < lease.attempt else None
        case Waiting(attempt) if attempt > lease.attempt:
            return None
        case Waiting() if isinstance(new, Waiting):
            # Tries that were lost meanwhile count on, and so does the doubt.
            return msgspec.structs.replace(new, lost=max(new.lost, found.lost), doubt=new.doubt or found.doubt)
        case Waiting():
            return new
        case Done():
            return None


def kept_seconds(claim: Claim, now: Callable[[], datetime]) -> float:
    """How long a claim is kept from `now()` on. The clock is asked only where the claim waits."""
    waits = max(0.0, (claim.due - now()).total_seconds()) if isinstance(claim, Waiting) else 0.0
    return CLAIM_KEPT_SECONDS + waits
