"""How a digest's job differs from others: it is one message about many notifications, its members. Pure.

What is planned late for a window, when its digest was sent already, goes with one more message, the next round of the same
digest. A round begins when the receipts of the one before it are stored, so nothing is a member of two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from msgspec.structs import replace

from engine.channels.channel import Job
from engine.jobs.claims import Claim, Done

STAGE: Final = "digest"

_PREFIX: Final = "digest/"


def digest_id(key: str, round: int = 1) -> str:
    """The id of a digest's job in place of a notification's.

    Args:
        key: its category and the end of its window, as plans say it.
        round: counts the messages of one window.
    """
    return f"{_PREFIX}{key}" if round == 1 else f"{_PREFIX}{key}/{round}"


def is_digest(id: str) -> bool:
    """Whether this may be the id of a digest's job. An event may have such an id, too."""
    return id.startswith(_PREFIX)


def key_in(id: str) -> str:
    """The key in the id of a digest's job, in whatever round."""
    key = id.removeprefix(_PREFIX)
    before, _, last = key.rpartition("/")
    return before if last.isdecimal() else key


def with_members(job: Job, claim: Claim | None) -> Job:
    """The job with what is settled about it."""
    if claim is None or claim.members is None:
        return job
    return replace(job, members=claim.members)


def next_round(job: Job, done: Done, now: datetime, *, fresh: bool) -> Job | None:
    """The job that asks for what is left of a digest that has ended; None: nothing can be.

    Args:
        fresh: it was ended just now, by this message. Else the message is another one of the same window: a repetition, or the
            schedule of a record that was planned late. A message that came while there were other attempts was dropped.
    """
    left = not fresh or done.attempt > 0 or (done.members is not None and done.members.more)
    if not job.digest or job.target or not left:
        return None
    said = job.id.removeprefix(digest_id(job.digest)).removeprefix("/")
    return Job(
        id=digest_id(job.digest, int(said or 1) + 1),
        tenant=job.tenant,
        user=job.user,
        type=job.type,
        channel=job.channel,
        stage=STAGE,
        again=True,
        first_at=now,
        category=job.category,
        digest=job.digest,
    )
