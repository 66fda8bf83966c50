"""Which deliveries are open and past their time, and whether anything in JOBS still stands for one. Pure.

A job is in JOBS from before its plan is over until after its end is a stored fact. So what is open, and has neither a job nor a
schedule, is lost: JOBS was made anew, or somebody has meddled with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec

from engine.channels.channel import Job, Lane
from engine.jobs.claims import Done
from engine.plan.rules import CHANNELS, TypeRule
from projections.folds.changes import NO_RECORD
from projections.folds.deliveries import try_of
from seamark.protocol.records import Record, decode_record

GRACE: Final = timedelta(hours=1)
"""How long after its time the sweep looks at an open delivery: what is under way by then has long been in JOBS."""

LOST: Final = "lost"


class Open(NamedTuple):
    """A delivery that has not ended, as its row says.

    Args:
        at: since when it is in this state.
        plan_at, plan_when: of a plan; where there is none, None and "".
        record: of the inbox, if it is there: what a lost job would have told.
    """

    tenant: str
    user: str
    id: str
    channel: str
    device: str
    state: str
    rank: int
    at: datetime
    plan_at: datetime | None
    plan_when: str
    record: bytes | None

    @property
    def number(self) -> int:
        """The number of the try that it waits for; 0: of the first, which was only planned."""
        return try_of(max(0, self.rank))


def waited_until(one: Open) -> datetime:
    """When a delivery was to go on at the latest, as far as its row says; what is tried again is scheduled in JOBS."""
    kind, _, rest = one.plan_when.partition(":")
    if one.state != "planned" or one.plan_at is None:
        return one.at
    try:
        if kind == "at":
            return max(one.plan_at, _zoned(rest))
        if kind == "unless_seen":
            return one.plan_at + timedelta(seconds=float(rest))
        if kind == "digest":
            return max(one.plan_at, _zoned(rest.rpartition("/")[2]))
    except (ValueError, OverflowError):
        pass  # another version has written it: JOBS says whether it waits
    return one.plan_at


def _zoned(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def stands_for(job: Job, one: Open) -> bool:
    """Whether a job is the one of this delivery, whatever it is about to do."""
    if job.digest and one.plan_when == f"digest:{job.digest}":
        return True  # it asks for its members when it is due
    ids = job.members.ids if job.members is not None else (job.id,)
    return one.id in ids and (one.device == job.target or not one.device or not job.target)


def lost_among(rows: Iterable[Open], jobs: Iterable[Job]) -> list[Open]:
    """The rows for which none of these jobs stands: they are all that JOBS has of a user by a channel."""
    known = list(jobs)
    return [one for one in rows if not any(stands_for(job, one) for job in known)]


def record_of(one: Open) -> Record | None:
    """The record, if the inbox has it and it can be read."""
    try:
        return None if one.record is None else decode_record(one.record)
    except NO_RECORD:
        return None


def job_of(one: Open, record: Record, rule: TypeRule | None) -> Job | None:
    """The job that was lost, as far as its record and the rule of its type tell it; None: it is of no channel."""
    if one.channel not in CHANNELS:
        return None
    try:
        data: Any = msgspec.json.decode(record.data)
    except NO_RECORD:
        return None
    return Job(
        id=one.id,
        tenant=one.tenant,
        user=one.user,
        type=record.type or "",
        channel=one.channel,
        lane=_lane(record.priority or "normal", rule),
        target=one.device,
        attempt=max(0, one.number - 1),
        semantics=(rule.semantics if rule is not None else None) or "at_least_once",
        first_at=one.plan_at or one.at,
        expires_at=record.expires_at,
        category=record.category or (rule.category if rule is not None else None) or "",
        collapse_key=record.collapse_key or "",
        data=data,
        trace=record.trace or "",
        stored_at=one.plan_at,
        requested=record.plan.get(one.channel, {}).get("why") == "requested",
        transaction=record.transaction_id or "",
    )


def _lane(said: str, rule: TypeRule | None) -> Lane:
    """As planners choose it (`engine.planner.jobs`)."""
    if "critical" in (said, rule.priority if said == "normal" and rule is not None else ""):
        return "critical"
    return "bulk" if said == "low" else "normal"


def end_of(one: Open, job: Job | None) -> Done:
    """How it ends: in doubt, where it was tried, for a provider may have taken it, and only its claim, whose name is lost, tells.

    So does what must not be sent twice: nobody knows whether a worker had begun with it.
    """
    doubtful = one.number > 1 or (job is not None and job.semantics != "at_least_once")
    return Done(max(0, one.number - 1), "ambiguous" if doubtful else "failed", LOST)
