"""Jobs as messages of JOBS: their subjects, and the schedules that have the broker hand them out later."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Final

import msgspec

from engine.broker.jetstream import Outgoing
from engine.channels.channel import Job, Lane
from engine.plan.rules import Channel
from seamark.protocol.subjects import encode_token, encode_user

LANES: Final[tuple[Lane, ...]] = ("critical", "normal", "bulk")

_encode = msgspec.json.Encoder().encode
decode_job = msgspec.json.Decoder(Job).decode


def job_subject(job: Job) -> str:
    """Where a job waits: `job.<channel>.<lane>.<tenant>.<user>`.

    Raises:
        InvalidToken: there can be no such tenant or user.
    """
    return f"job.{job.channel}.{job.lane}.{encode_token(job.tenant)}.{encode_user(job.user)}"


def job_consumer(channel: Channel, lane: Lane) -> str:
    """The durable consumer that workers take the jobs of a lane through."""
    return f"{channel}-{lane}"


def message_of(job: Job) -> Outgoing:
    """A job to be handed out at once."""
    return Outgoing(job_subject(job), _encode(job))


def schedule_of(job: Job, due: datetime) -> Outgoing:
    """A job to be handed out at `due`; at once, where that is past.

    The subject names the job, its attempt, stage and put-backs, and the time: so the same name always means the same job at the
    same time, and to write it twice is harmless. Nothing relies on one schedule replacing another, because a schedule that fires
    purges its subject and would take the other one with it.
    """
    name = hashlib.blake2b(job.claim_key.encode(), digest_size=15).hexdigest()
    milliseconds = round(due.timestamp() * 1000)
    place = f"{job.channel}.{encode_token(job.tenant)}.{encode_user(job.user)}"
    at = datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    headers = f"Nats-Schedule:@at {at}\r\nNats-Schedule-Target:{job_subject(job)}\r\n"
    name += f"-{job.attempt}-{job.stage}-{job.put_backs}-{milliseconds}"
    return Outgoing(f"jobsched.{place}.{name}", _encode(job), headers.encode())
