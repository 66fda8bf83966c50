"""The part of a decision's inputs that comes from the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from engine.channels.channel import Job
from engine.plan.decisions import Facts, Notification, Stage
from seamark.protocol.events import Priority

_PRIORITY: Final[Mapping[str, Priority]] = {"critical": "critical", "bulk": "low"}


def facts_of(job: Job, known: Facts | None, *, cancelled: bool) -> Facts:
    """The facts of a decision about a job.

    One that its planner sent at once (`first`) is decided again as a `retry`: it is neither put into a digest nor escalated.

    Args:
        known: what was found out about a job that was woken; none: nothing was asked.
    """
    stage: Stage = "retry" if job.stage == "first" else job.stage  # type: ignore[assignment]
    if known is None:
        return Facts(stored_at=job.stored_at or job.first_at, stage=stage, cancelled=cancelled)
    return replace(known, stage=stage, cancelled=known.cancelled or cancelled)


def notification_of(job: Job) -> Notification:
    """The notification that a job is about, as far as decisions are concerned."""
    return Notification(
        id=job.id,
        tenant=job.tenant,
        user=job.user,
        type=job.type,
        category=job.category or None,
        priority=_PRIORITY.get(job.lane, "normal"),
        channels=(job.channel,) if job.requested else None,
        expires_at=job.expires_at,
    )
