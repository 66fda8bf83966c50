"""What became of a notification, from stored facts alone: each with its time and place, and what is not proven said."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec

from engine.channels.channel import UNREPORTED
from engine.postgres import QUERY_SECONDS, Pool, one_view
from projections.folds.changes import NO_RECORD
from projections.folds.deliveries import PLAN_RANK, names_in
from projections.postgres.versions import live
from projections.tries import FindTold, Told
from seamark.protocol.records import Record, decode_record
from seamark.protocol.subjects import RECEIPTS_STREAM

USERS_MAX: Final = 20
"""Users of one event shown at a time; name one for more."""

RANGES_MAX: Final = 200
"""Receipts of gateways shown of one notification: more devices than a user has."""

CLOCKS: Final = timedelta(minutes=1)
"""Streams have the clocks of their leaders: a receipt may seem to be older than its record."""

_NOTIFICATIONS: Final = f"""
SELECT * FROM inbox
WHERE version = {live("inbox")}
  AND tenant = $1 AND id = $2 AND ($3::text IS NULL OR user_id = $3)
ORDER BY user_id LIMIT $4
"""

_RANGES: Final = f"""
SELECT device, channel, state, after_seq, up_to, at, sent_at FROM delivery_ranges
WHERE version = {live("deliveries")}
  AND tenant = $1 AND user_id = $2 AND epoch = $3 AND after_seq < $4 AND up_to >= $4 ORDER BY at LIMIT $5
"""

_FACTS: Final = f"""
SELECT * FROM deliveries
WHERE version = {live("deliveries")}
  AND tenant = $1 AND user_id = $2 AND id = $3 ORDER BY channel, device
"""

_FOLDED: Final = """
SELECT c.stream, c.partition, c.epoch, c.seq, c.updated_at
FROM projection_checkpoints c JOIN projection_versions v USING (projection, version)
ORDER BY c.stream, c.partition
"""


class Name(msgspec.Struct, frozen=True):
    """What a provider calls a message that it took, at this try."""

    attempt: int
    provider: str
    id: str


class Fact(msgspec.Struct, omit_defaults=True):
    """One thing that is known.

    Attributes:
        fact: emitted, stored, planned, dispatched, sent, delivered, acknowledged, read, …
        at: when; None where the time is not known.
        where: `<stream> <epoch>.<seq>` of what proves it, or the receipts that do.
        attempts, reason: of a channel, the number of the try, and why it is in this state.
        provider: who has tried it last. names: of each try that a provider took, what that one calls the message.
        segments: of an SMS, how many the price is for.
    """

    fact: str
    at: datetime | None = None
    where: str | None = None
    channel: str | None = None
    device: str | None = None
    detail: str | None = None
    attempts: int = 0
    reason: str | None = None
    provider: str | None = None
    names: list[Name] = []
    segments: int = 0


class Proof(msgspec.Struct):
    """All that is known of one notification of one user.

    Attributes:
        trace: the id of its trace, where it has one; trace_url: where that can be looked at, if it is said where traces are.
        not_proven: what cannot be told from what is stored, in plain words.
        as_of: how far receipts and logs were folded when this was asked.
    """

    id: str
    tenant: str
    user: str
    type: str | None
    trace: str | None
    facts: list[Fact]
    not_proven: list[str]
    as_of: list[str]
    carried: bool = False
    trace_url: str | None = None


class StoredEvent(NamedTuple):
    """Which stream has stored an event, and when."""

    stream: str
    at: datetime


FindEvent = Callable[[str, int], Awaitable[StoredEvent | None]]
"""`find_event(epoch, seq)`: None when its stream no longer holds it, or cannot be asked."""


class Proofs:
    """Proofs from the tables in PostgreSQL."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def of(
        self,
        tenant: str,
        id: str,
        user: str | None = None,
        *,
        find_event: FindEvent | None = None,
        find_told: FindTold | None = None,
    ) -> list[Proof]:
        """What is known of the notification `id`, for one user or the first few; empty when nothing is.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        if any("\0" in text for text in (tenant, id, user or "")):
            return []
        async with one_view(self._pool, QUERY_SECONDS) as connection:
            rows = await connection.fetch(_NOTIFICATIONS, tenant, id, user, USERS_MAX)
            found = []
            for row in rows:
                place = (tenant, row["user_id"], row["epoch"], row["seq"], RANGES_MAX)
                ranges = await connection.fetch(_RANGES, *place)
                found.append((row, ranges, await connection.fetch(_FACTS, tenant, row["user_id"], id)))
            folded = await connection.fetch(_FOLDED)
        stored = None
        if find_event is not None and rows and rows[0]["event_seq"] is not None:
            stored = await find_event(rows[0]["event_epoch"], rows[0]["event_seq"])
        proofs = []
        for row, ranges, facts in found:
            told = await find_told(tenant, row["user_id"], id, row["stored_at"] - CLOCKS) if find_told and facts else []
            proofs.append(prove(row, ranges, facts, folded, stored, told))
        return proofs


def prove(
    row: asyncpg.Record,
    ranges: list[asyncpg.Record],
    receipts: list[asyncpg.Record],
    folded: list[asyncpg.Record],
    stored: StoredEvent | None,
    told: Sequence[Told] = (),
) -> Proof:
    """Put the facts of one notification in order, and name the gaps.

    Args:
        stored: where its event is and since when, if known.
        told: each receipt of a channel, as far as they were found.
    """
    record = _record(row)
    present = any(one["epoch"] == row["epoch"] for one in folded)
    facts = (
        _of_the_log(row, record, stored)
        # A range covers what devices were sent as a position only, too: of a record that was withheld it proves nothing.
        + _of_gateways(ranges if row["withheld"] is None else [])
        + _of_channels(receipts, told)
        + _of_the_user(row, present)
    )
    facts.sort(key=_order)
    as_of = [
        f"{one['stream']} {one['epoch']}.{one['seq']} (partition {one['partition']}), folded {_text(one['updated_at'])}"
        for one in folded
        if one["stream"] == RECEIPTS_STREAM or one["epoch"] == row["epoch"]
    ]
    return Proof(
        id=row["id"],
        tenant=row["tenant"],
        user=row["user_id"],
        type=row["type"],
        trace=record.trace.split("-")[1] if record and record.trace and record.trace.count("-") == 3 else None,
        facts=facts,
        not_proven=_gaps(row, record, facts),
        as_of=as_of,
        carried=row["carried"],
    )


def _record(row: asyncpg.Record) -> Record | None:
    """None: somebody else than a dispatcher wrote it."""
    try:
        return decode_record(bytes(row["record"]))
    except NO_RECORD:
        return None


def _of_the_log(row: asyncpg.Record, record: Record | None, stored: StoredEvent | None) -> list[Fact]:
    place = f"{row['event_epoch']}.{row['event_seq']}" if row["event_seq"] is not None else None
    by = "by the clock of the publisher, or when it was stored if it gave none"
    facts = [Fact("emitted", record.at, detail=by)] if record is not None else []
    if place is not None:
        facts.append(
            Fact("stored", None, f"event {place}")
            if stored is None
            else Fact("stored", stored.at, f"{stored.stream} {place}")
        )
    facts.append(Fact("dispatched", row["stored_at"], f"LOG {row['epoch']}.{row['seq']}"))
    for channel, plan in record.plan.items() if record is not None else ():
        why = f"{plan.get('when', '?')}, because: {plan.get('why', '?')}"
        facts.append(Fact("planned", row["stored_at"], channel=channel, detail=why))
    return facts


def _of_gateways(ranges: list[asyncpg.Record]) -> list[Fact]:
    """The first receipt of each device and state is the fact; later ones say the same again."""
    first: dict[tuple[str, str, str], Fact] = {}
    for one in ranges:
        where = f"receipt of records {one['after_seq'] + 1} to {one['up_to']}"
        sent_at = one["at"] if one["state"] == "sent" else one["sent_at"]
        told = [("sent", sent_at)] + ([("acknowledged", one["at"])] if one["state"] == "acknowledged" else [])
        for state, at in told:
            if at is not None:
                key = (state, one["channel"], one["device"])
                first.setdefault(key, Fact(state, at, where, one["channel"], one["device"]))
    return list(first.values())


def _of_channels(receipts: list[asyncpg.Record], told: Sequence[Told]) -> list[Fact]:
    """What channels say: each receipt, and of those that are not at hand what the table has kept.

    What was stored twice, as somebody died in between, says the same: the first is the fact.
    """
    first: dict[tuple[Any, ...], Fact] = {}
    for one in map(_of_receipt, told):
        first.setdefault((one.fact, one.attempts, one.reason, one.channel, one.device), one)
    facts = list(first.values())
    at_hand = {(fact.fact, fact.channel, fact.device) for fact in facts}
    return facts + [one for one in _of_table(receipts) if (one.fact, one.channel, one.device) not in at_hand]


def _of_receipt(one: Told) -> Fact:
    receipt = one.receipt
    names = [Name(receipt.attempt, receipt.provider or "", receipt.provider_id)] if receipt.provider_id else []
    return Fact(
        receipt.state,
        receipt.at,
        one.where,
        receipt.channel,
        receipt.device or None,
        _in_words(receipt.attempt, receipt.provider or "", receipt.reason or "", names, receipt.segments),
        attempts=receipt.attempt,
        reason=receipt.reason,
        provider=receipt.provider,
        names=names,
        segments=receipt.segments,
    )


def _in_words(attempt: int, provider: str, reason: str, names: Sequence[Name], segments: int) -> str | None:
    words = [f"attempt {attempt}" if attempt else "", provider, reason]
    words += [f"{name.provider or 'the provider'} calls it {name.id} (attempt {name.attempt})" for name in names]
    words += [f"{segments} segments" if segments else ""]
    return ", ".join(word for word in words if word) or None


def _of_table(receipts: list[asyncpg.Record]) -> list[Fact]:
    facts = []
    for one in receipts:
        if one["plan_at"] is not None:
            plan = f"{one['plan_when']}, because: {one['plan_why']}"
            place = f"receipt of the planner, term {one['plan_term']}"
            facts.append(Fact("planned", one["plan_at"], place, one["channel"], detail=plan))
        if one["rank"] <= PLAN_RANK:
            continue
        names = [Name(int(number), provider, id) for number, provider, id in names_in(one["provider_ids"])]
        detail = _in_words(one["attempts"], one["provider"], one["reason"], names, one["segments"])
        where, device = "receipt", one["device"] or None
        facts += [
            Fact(state, one[f"{state}_at"], where, one["channel"], device)
            for state in ("sent", "delivered", "acknowledged", "seen", "read")
            if one[f"{state}_at"] is not None and state != one["state"]
        ]
        told = {"reason": one["reason"] or None, "provider": one["provider"] or None, "segments": one["segments"]}
        counted = {"attempts": one["attempts"], "names": names}
        facts.append(Fact(one["state"], one["at"], where, one["channel"], device, detail, **told, **counted))
    return facts


def _of_the_user(row: asyncpg.Record, present: bool) -> list[Fact]:
    """`present`: the record's log is the one of today. Else the one that followed may have said it, and none is named."""

    def where(seq: int) -> str | None:
        return f"LOG {row['epoch']}.{seq}" if present else None

    facts = []
    for name, device in (("read", row["read_device"]), ("archived", None), ("recalled", None)):
        if row[f"{name}_seq"] is not None:
            facts.append(Fact(name, row[f"{name}_at"], where(row[f"{name}_seq"]), device=device))
    if row["superseded_seq"] is not None:
        facts.append(Fact("superseded", None, where(row["superseded_seq"]), detail=row["collapse_key"]))
    if row["expires_at"] is not None:
        past = row["expires_at"] <= datetime.now(UTC)
        facts.append(Fact("expired" if past else "expires", row["expires_at"]))
    return facts


def _gaps(row: asyncpg.Record, record: Record | None, facts: list[Fact]) -> list[str]:
    """What is not proven. That there is no proof does not mean that it did not happen."""
    known = {(fact.fact, fact.channel) for fact in facts}
    sent = {fact.device for fact in facts if fact.fact == "sent" and fact.channel == "inapp"}
    acknowledged = {fact.device for fact in facts if fact.fact == "acknowledged" and fact.channel == "inapp"}
    gaps = [] if record is not None else ["when it was emitted, and its plan: its bytes are no whole record"]
    if row["event_seq"] is None:
        gaps.append("which event it came from: the record names none")
    elif ("stored", None) in {(fact.fact, fact.at) for fact in facts}:
        gaps.append("when the event was stored: its stream was not asked, or no longer holds it")
    # The planner's word comes after the record's, and counts.
    planned = {fact.channel: fact.detail or "" for fact in facts if fact.fact == "planned"}
    wanted = [channel for channel, plan in planned.items() if not plan.startswith("never,")]
    for channel in wanted if row["withheld"] is None else ():
        states = {state for state, other in known if other == channel} - {"planned"}
        if not states and channel == "inapp":
            gaps.append("sent: no receipt of a gateway says that a device was sent it")
        elif not states:
            gaps.append(f"sent by {channel}: no receipt of that channel")
    gaps += [
        f"delivered by {fact.channel}: {fact.provider} took it, and never reports what became of it"
        for fact in facts
        if fact.fact == "sent" and (fact.reason or "").endswith(f"/{UNREPORTED}")
    ]
    silent = sorted(device or "?" for device in sent - acknowledged)
    gaps += [f"acknowledged by device {device}: it was sent, no acknowledgement is stored" for device in silent]
    if row["read_seq"] is None and row["withheld"] is None:
        gaps.append("read: no record says so")
    if row["carried"]:
        gaps.append("that the tables still equal the log here: the record is older than what the log holds")
    return gaps


_STEPS: Final = ("emitted", "stored", "dispatched", "planned", "sent", "delivered", "acknowledged", "seen", "read")


def _order(fact: Fact) -> tuple[int, float, int]:
    """The way to the log first, in its order, whatever publishers' clocks say; then by time, as exact as receipts are."""
    step = _STEPS.index(fact.fact) if fact.fact in _STEPS else len(_STEPS)
    return (min(step, 4), math.inf if fact.at is None else round(fact.at.timestamp(), 3), step)


def _text(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
