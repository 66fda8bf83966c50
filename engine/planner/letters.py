"""What becomes of jobs that are not made: each is a dead letter, from which it can be replayed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import msgspec
import structlog

from engine import metrics
from engine.broker.jetstream import Broker, Outgoing
from engine.broker.refusals import is_full
from engine.channels.channel import Job
from engine.errors import BrokerError
from engine.jobs.claims import Done
from engine.jobs.receipts import receipts_of
from engine.letters.letter import SUPPRESSED, THROTTLED
from engine.letters.writing import store_job_letter
from engine.patience import patiently
from engine.traces.contexts import trace_line
from engine.traces.lines import about_followed
from seamark.protocol.subjects import receipt_subject

_encode = msgspec.json.Encoder().encode

_log = structlog.get_logger("seamark.planner")

OVER_SHARE: Final = Done(0, SUPPRESSED, THROTTLED)
"""Its tenant has too many jobs waiting. The plan itself says so: no other receipt does."""

REFUSED: Final = Done(0, "failed", "jobs_refused")
"""JOBS can never take it."""

LETTERS_AT_ONCE: Final = 64
"""They are no batch, as their stream takes none: so many are on their way, or a flood of them would hold up all logs."""

_STORED = metrics.planner_letters.labels("stored")
_FULL = metrics.planner_letters.labels("full")


async def bury(broker: Broker, jobs: Sequence[Job], done: Done) -> None:
    """Store the letter of each job. Where there is no room for it the job is passed over: that it has ended is in RECEIPTS.

    Raises:
        BrokerError: DEAD-LETTERS refuses what is no letter to it.
    """
    for start in range(0, len(jobs), LETTERS_AT_ONCE):
        part = jobs[start : start + LETTERS_AT_ONCE]
        await asyncio.gather(*(patiently(_store, broker, job, done, seconds=math.inf) for job in part))


def end_receipts(job: Job, done: Done, partition: int, at: datetime) -> list[Outgoing]:
    """The receipts that say how a job has ended that was planned and is not made."""
    subject, line = receipt_subject(partition, job.tenant, job.user), trace_line(job.trace) if job.trace else b""
    return [Outgoing(subject, _encode(one), line) for one in receipts_of(job, done, at)]


async def _store(broker: Broker, job: Job, done: Done) -> None:
    try:
        await store_job_letter(broker, job, done)
    except BrokerError as error:
        if not is_full(error):
            raise
        # To wait for room would be to have everybody wait for whom the letters are of.
        with about_followed(job.trace):
            _log.error("letter_passed_over", channel=job.channel, why=done.why)
        _FULL.inc()
    else:
        _STORED.inc()
