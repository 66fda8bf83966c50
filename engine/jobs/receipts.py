"""The facts that are stored of a job: what its claim says, as receipts. Written twice they say the same."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from msgspec.structs import replace

from engine.channels.channel import Job, Members, Outcome
from engine.jobs.claims import Done, End, Waiting
from engine.jobs.life import Doubt
from seamark.protocol.receipts import Receipt

QUEUED: Final = "queued"
"""State of a job that is tried again, or was made by splitting another one. Like every state of a higher attempt it takes the
place of what the attempt before was."""

AMBIGUOUS: Final = "ambiguous"

USER_DELETED: Final = "user_deleted"

ENDED_BY: Final[dict[str, End]] = {"expired": "expired", "cancelled": "cancelled", "recalled": "cancelled"}
"""How a job ends that is never sent, by the reason of the decision; for all other reasons it is suppressed."""


def _of_each(job: Job, members: Members | None, receipt: Receipt) -> list[Receipt]:
    """The fact of each notification that the job is about."""
    if not job.digest:
        return [receipt]
    if members is None:
        return []
    attempt = receipt.attempt + members.tried
    return [replace(receipt, id=id, attempt=attempt, trace=members.traces.get(id)) for id in members.ids]


def _receipt(job: Job, state: str, attempt: int, reason: str, at: datetime, outcome: Outcome | None = None) -> Receipt:
    return Receipt(
        user=job.user,
        channel=job.channel,
        state=state,
        at=at,
        device=job.target,
        id=job.id,
        reason=reason or None,
        attempt=job.tries_before + attempt + 1,  # a receipt counts tries from 1, over all lives
        provider=(outcome.provider or None) if outcome is not None else None,
        trace=job.trace or None,
        provider_id=(outcome.provider_id or None) if outcome is not None else None,
        segments=outcome.segments if outcome is not None else 0,
    )


def doubt_receipts(job: Job, doubt: Doubt, at: datetime) -> list[Receipt]:
    """That it is sent again, or without a claim, although the provider may have it: stored before it is sent."""
    return _of_each(job, job.members, _receipt(job, AMBIGUOUS, job.attempt, doubt, at))


def part_receipts(job: Job, targets: Sequence[str], members: Members | None, at: datetime) -> list[Receipt]:
    """That a job to each of these targets waits: stored before they are made, or nobody would miss one that JOBS has lost."""
    waits = [_receipt(replace(job, target=one), QUEUED, job.attempt, "", at) for one in targets]
    return [one for fact in waits for one in _of_each(job, members, fact)]


def receipts_of(job: Job, claim: Waiting | Done, at: datetime) -> list[Receipt]:
    """What a claim says, of a digest about each of its members.

    An end is one fact, and that a job is not over is another. That a try may have been taken, though nobody has said so, is a
    fact of its own, and comes first: no later one takes it away.
    """
    outcome = claim.outcome
    if isinstance(claim, Done):
        if claim.why == USER_DELETED:
            return []  # whatever is stored of him now would stay behind when he is erased
        # Where Redis has forgotten, an earlier attempt may have ended the job; in `deliveries` the later attempt wins, and this
        # is the end.
        attempt = max(claim.attempt, job.attempt)
        said = [_receipt(job, claim.end, attempt, claim.why, at, outcome)]
        if outcome is not None and outcome.unanswered:
            said.insert(0, _receipt(job, AMBIGUOUS, attempt, claim.why, at, outcome))
        ends = [one for fact in said for one in _of_each(job, claim.members, fact)]
        return ends + part_receipts(job, claim.targets, claim.members, at)
    if outcome is None:
        return []
    reason = outcome.code or outcome.kind
    said = [_receipt(job, QUEUED, claim.attempt, reason, at, outcome)]
    if outcome.kind == "ambiguous" or outcome.unanswered:
        said.insert(0, _receipt(job, AMBIGUOUS, claim.attempt - 1, reason, at, outcome))
    return [one for fact in said for one in _of_each(job, claim.members, fact)]
