"""Jobs as messages of JOBS: their subjects, and the schedules that have the broker hand them out later."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec

from engine.broker.jetstream import Outgoing
from engine.broker.wire import line_of, value_of
from engine.channels.channel import Job, Lane
from engine.plan.rules import Channel
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import decode_token, encode_token, encode_user

LANES: Final[tuple[Lane, ...]] = ("critical", "normal", "bulk")

_encode = msgspec.json.Encoder().encode
decode_job = msgspec.json.Decoder(Job).decode

NO_JOB: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises where bytes are no job that this version knows."""

_TIMES: Final = b"Seamark-Put-Back"
"""The header of a message that workers could not read: how often they have put it back, as it stands."""

_TIMES_LINE: Final = line_of(_TIMES)

_OTHERS_LINE: Final = re.compile(rb"(?!(?i:nats-)|%b:)[!-9;-~]+:[\x20-\x7e]*" % _TIMES)
"""A header that is neither the broker's nor that count."""

NOBODY: Final = "?"
"""In place of a tenant and a user, where a subject names none."""


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
    name += f"-{job.attempt}-{job.stage}-{job.put_backs}-{milliseconds}"
    return Outgoing(f"jobsched.{place}.{name}", _encode(job), _schedule_lines(job_subject(job), milliseconds))


def times_put_back(headers: bytes) -> int:
    """How often workers that could not read a message have put it back."""
    if _TIMES_LINE not in headers:  # nearly always
        return 0
    said = value_of(headers, _TIMES_LINE) or b""
    return int(said) if said.isdigit() and len(said) < 9 else 0


def schedule_as_it_stands(subject: bytes, headers: bytes, payload: bytes, due: datetime, times: int) -> Outgoing:
    """A message of JOBS, whatever it holds, to be handed out anew at `due`, and for the `times`th time.

    Args:
        headers: the raw block. Those are kept that are not the broker's own.
    """
    target, milliseconds = subject.decode(), round(due.timestamp() * 1000)
    _, channel, _, tenant, user = target.split(".")
    name = hashlib.blake2b(b"%b %b" % (subject, payload), digest_size=15).hexdigest()
    kept = [line + b"\r\n" for line in headers.split(b"\r\n")[1:] if _OTHERS_LINE.fullmatch(line)]
    lines = _schedule_lines(target, milliseconds) + b"".join(kept) + b"%b:%d\r\n" % (_TIMES, times)
    return Outgoing(f"jobsched.{channel}.{tenant}.{user}.{name}-{milliseconds}", payload, lines)


def _schedule_lines(target: str, milliseconds: int) -> bytes:
    at = datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f"Nats-Schedule:@at {at}\r\nNats-Schedule-Target:{target}\r\n".encode()


class _Legible(msgspec.Struct):
    """What may be read of a job that another version has written."""

    id: str = ""
    type: str = ""
    target: str = ""
    attempt: int = 0
    tries_before: int = 0
    digest: str = ""
    trace: str = ""


_decode_legible = msgspec.json.Decoder(_Legible).decode


class Unreadable(NamedTuple):
    """A message that is no job which this version can read: its bytes, and what can be said of it all the same.

    `job.id` is "" where nothing of it can be read. It must never be sent or scheduled: it is not the whole job.
    """

    job: Job
    payload: bytes


def unreadable_job(channel: Channel, subject: bytes, payload: bytes) -> Unreadable:
    """What can be said of a message of the lanes of `channel` that `decode_job` does not take."""
    try:
        told = _decode_legible(payload)
    except NO_JOB:
        told = _Legible()
    tenant, user = _whose(subject)
    job = Job(
        id=told.id,
        tenant=tenant,
        user=user,
        type=told.type,
        channel=channel,
        target=told.target,
        attempt=max(0, told.attempt),
        tries_before=max(0, told.tries_before),
        first_at=datetime.now(UTC),
        digest=told.digest,
        trace=told.trace,
    )
    return Unreadable(job, payload)


def _whose(subject: bytes) -> tuple[str, str]:
    try:
        _, _, _, tenant, user = subject.decode().split(".")
        names = decode_token(tenant), decode_token(user)
        encode_user(names[1])
    except (ValueError, InvalidToken):
        return NOBODY, NOBODY
    return names
