"""Stores the dead letters of jobs."""

from __future__ import annotations

from engine.broker.jetstream import WRONG_LAST_SEQUENCE, After, Broker
from engine.channels.channel import Job
from engine.errors import ApiError
from engine.jobs.claims import Done
from engine.letters.letter import job_letter
from engine.limits import LETTER_SECONDS
from engine.traces.messages import job_dead
from engine.traces.spans import active
from seamark.protocol.subjects import DEAD_LETTERS_STREAM


async def store_job_letter(broker: Broker, job: Job, done: Done, unreadable: bytes | None = None) -> None:
    """Store the letter of a job that has ended, once for each of its lives however often it is tried.

    A span says so, also where its notification is not followed.

    Args:
        unreadable: as of `job_letter`.

    Raises:
        BrokerError: it could not be stored, or nobody knows; `is_full` tells where there is no room.
    """
    subject, payload, headers = job_letter(job, done, unreadable)
    try:
        after = After(DEAD_LETTERS_STREAM, 0)
        await broker.append(subject, payload, headers, after=after, budget_seconds=LETTER_SECONDS)
    except ApiError as error:
        if error.err_code != WRONG_LAST_SEQUENCE:
            raise
        return
    spans = active()
    if spans is not None:
        job_dead(spans, job, headers["Seamark-Class"])
