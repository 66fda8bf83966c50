"""A dead letter: an event that could not be dispatched, or a job that ended without success, whole and with the reason.

Its headers say what it is about, so that letters are listed and counted without a look into what people were to be told.
No header has an address, a token or a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from engine.broker.jetstream import Stored
from engine.channels.channel import Job
from engine.jobs.claims import Done
from engine.jobs.messages import NO_JOB
from engine.letters.headers import header_text
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import decode_token, job_letter_subject, parse_stored_event

Kind = Literal["event", "job"]

UNREADABLE: Final = "unreadable"
"""The code of a letter whose message is no job that the worker's version knows."""

SUPPRESSED: Final = "suppressed"
THROTTLED: Final = "throttled"
"""The reason of a job that was suppressed because its tenant had too many waiting: nobody decided against it, so it can be
replayed."""

JOB_CLASSES: Final = (
    "ambiguous", "config", "jobs_refused", "lost", "opted_out", "permanent", "poison", "suppressed", "target_invalid",
    "throttled", "transient",
)  # fmt: skip
"""Every class that `job_letter` can write; see `Letter`. `opted_out`: an earlier try may have been taken."""

EVENT_CLASSES: Final = (
    "category", "channels", "collapse_key", "data", "disagreement", "expires_at", "id", "internal", "json", "late", "later_full",
    "not_put_off", "schema", "semantics", "send_at", "size", "subject", "time", "to", "transaction_id",
)  # fmt: skip
"""Classes of letters of events: why a dispatcher refused them."""


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of a dead letter.

    Args:
        seq: which one, in DEAD-LETTERS.
        at: since when it is there.
        cls: of a job how its last try ended (`permanent`, `config`, …), or how it has ended without one (`poison`, `lost`,
            `ambiguous`, `suppressed`); of an event why it was refused (`schema`, `subject`, `late`, …).
        code: the provider's own; of an event the same as its class.
        known: whether the tables name the code: what nobody has foreseen is for a person to look at.
        in_doubt: of a job, whether it may have been sent all the same.
        tries: of a job, the highest number of a try that a receipt of it has.
        detail: of an event, what is wrong with it and how to mend that.
        original: of an event, where it was: `<epoch>.<seq>`.
        subject: of an event, what it was stored under.
        trace: the W3C `traceparent`.
    """

    seq: int
    at: datetime
    kind: Kind
    tenant: str = ""
    user: str = ""
    channel: str = ""
    cls: str = msgspec.field(name="class", default="")
    code: str = ""
    provider: str = ""
    known: bool = True
    in_doubt: bool = False
    tries: int = 0
    type: str = ""
    id: str = ""
    detail: str = ""
    original: str = ""
    subject: str = ""
    trace: str = ""


def deserves_letter(done: Done) -> bool:
    """Whether a person may want to look at how a job has ended, or replay it.

    Not where it was sent or split; and not where somebody has decided it: the user (preferences, an opt-out), the service that
    cancelled it or set its end, the operator who dropped it. An address that is suppressed has been judged before.
    """
    return done.end in ("failed", "ambiguous") or (done.end == SUPPRESSED and done.why == THROTTLED)


def job_letter(job: Job, done: Done, unreadable: bytes | None = None) -> tuple[str, bytes, dict[str, str]]:
    """The letter of a job as it is stored: subject, payload, headers.

    Args:
        unreadable: the message that could not be read, of which `job` is what can be said.
    """
    known_by = job.claim_key.encode() if unreadable is None else unreadable
    name = hashlib.blake2b(known_by, digest_size=15).hexdigest()
    outcome = done.outcome
    cls: str = done.end
    if outcome is not None:
        cls = outcome.kind
    elif done.end == "failed":
        cls = done.why or done.end
    code = (outcome.code if outcome is not None else "") or done.why or cls
    tries = job.tries_before + max(done.attempt, job.attempt) + 1
    headers = {
        "Seamark-Class": cls,
        "Seamark-Code": code if unreadable is None else UNREADABLE,
        "Seamark-Provider": outcome.provider if outcome is not None else "",
        "Seamark-Known": "yes" if outcome is None or outcome.known else "no",
        "Seamark-Doubt": "yes" if done.end == "ambiguous" else "no",
        "Seamark-Tries": str(tries),
        "Seamark-Type": job.type,
    }
    if job.trace:
        headers["traceparent"] = job.trace
    shown = {key: header_text(value) for key, value in headers.items() if value}
    return (
        job_letter_subject(job.tenant, job.user, job.channel, name),
        msgspec.json.encode(job) if unreadable is None else unreadable,
        shown,
    )


def letter_of(stored: Stored) -> Letter | None:
    """What is said of a stored letter; None: somebody else wrote it.

    The id of a job is in the payload; nothing else is read from there. Where it cannot be read it is "".
    """
    try:
        return _of_job(stored) if stored.subject.startswith("dlq.job.") else _of_event(stored)
    except (InvalidToken, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _of_job(stored: Stored) -> Letter:
    _, _, tenant, user, channel, _ = stored.subject.split(".")
    told = _headers(stored)
    if "Seamark-Class" not in told:
        raise ValueError("somebody else has written it")
    return Letter(
        seq=stored.seq,
        at=_moment(stored.time),
        kind="job",
        tenant=decode_token(tenant),
        user=decode_token(user),
        channel=channel,
        cls=told.get("Seamark-Class", ""),
        code=told.get("Seamark-Code", ""),
        provider=told.get("Seamark-Provider", ""),
        known=told.get("Seamark-Known") != "no",
        in_doubt=told.get("Seamark-Doubt") == "yes",
        tries=int(told.get("Seamark-Tries", "0")),
        type=told.get("Seamark-Type", ""),
        id=id_in(stored.payload),
        trace=told.get("traceparent", ""),
    )


class _Named(msgspec.Struct):
    id: str = ""


_decode_named: Final = msgspec.json.Decoder(_Named).decode


def id_in(payload: bytes) -> str:
    """The id of the event or job in a letter; "" where it cannot be read."""
    try:
        return _decode_named(payload).id
    except NO_JOB:
        return ""


def _of_event(stored: Stored) -> Letter:
    told = _headers(stored)
    subject = told.get("Seamark-Subject", "")
    try:
        place = parse_stored_event(subject)
        tenant, type = place.tenant, place.type
    except InvalidToken:
        tenant, type = "", ""  # it died of its subject, and belongs to nobody
    reason = told.get("Seamark-Reason", "")
    return Letter(
        seq=stored.seq,
        at=_moment(stored.time),
        kind="event",
        tenant=tenant,
        cls=reason,
        code=reason,
        known=reason != "internal",
        type=type,
        detail=told.get("Seamark-Detail", ""),
        original=told.get("Seamark-Original", ""),
        subject=subject,
        trace=told.get("traceparent", ""),
    )


def _headers(stored: Stored) -> dict[str, str]:
    return dict(_lines(stored.headers))


def _lines(block: bytes) -> Iterator[tuple[str, str]]:
    for line in block.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            yield name.decode("ascii", "replace"), value.strip().decode("utf-8", "replace")


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
