"""What a planner makes of records, without I/O: which of them it decides about, from what, and what it writes down."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Final, NamedTuple

import msgspec

from engine.broker.jetstream import Outgoing
from engine.partition.worker import Delivered
from engine.plan.decide import narrowed
from engine.plan.decisions import Decision, Inputs, Notification
from engine.plan.gathering import TenantRules
from engine.traces.contexts import trace_line
from seamark.protocol.errors import InvalidToken
from seamark.protocol.events import INAPP, EventId, Label, Priority
from seamark.protocol.receipts import NO_INPUTS, PLANNED, Planned, Receipt
from seamark.protocol.subjects import decode_token, encode_token

INPUTS_BYTES_MAX: Final = 16 << 10
"""What a plan was decided from is stored with it, if it is no larger: a user with thousands of suppressed addresses must not make
receipts that the stream refuses."""

PLAN_BYTES_REMEMBERED: Final = 512
"""A plan that takes more in its record is read each time: what is remembered must stay small."""

_NO_RECORD: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidToken)

User = tuple[str, str]
"""Tenant and user."""


class _Said(msgspec.Struct, gc=False):
    """What a record says of a channel already."""

    when: str = ""
    why: str = ""


class _Entry(msgspec.Struct, gc=False):
    """The part of a record that a decision needs. `plan` is read by itself: nearly all records have one of a few."""

    id: EventId
    kind: str
    type: str | None = None
    category: Label | None = None
    priority: Priority = "normal"
    plan: msgspec.Raw = msgspec.Raw(b"{}")
    expires_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")
    collapse_key: Label | None = None
    trace: str | None = None
    transaction_id: str | None = None


_decode = msgspec.json.Decoder(_Entry).decode
_read_plan = msgspec.json.Decoder(dict[str, _Said]).decode
encode = msgspec.json.Encoder().encode


class Found(msgspec.Struct, frozen=True, gc=False):
    """A notification in a log, read no further than it takes to tell whether there is something to decide: mostly there is not.

    Attributes:
        tenant_token, user_token: as its subject has them.
        channels: those that its event asked for; None: it left the choice to the rule.
    """

    stored: Delivered
    entry: _Entry
    tenant: str
    tenant_token: str
    user_token: str
    channels: tuple[str, ...] | None

    @property
    def stored_at(self) -> datetime:
        """When the log stored it."""
        return datetime.fromtimestamp(self.stored.time_nanoseconds / 1e9, UTC)

    @property
    def subject(self) -> str:
        """That of its receipts."""
        return "rcpt" + self.stored.subject.decode().removeprefix("log")


class Due(NamedTuple):
    """A record to decide about. `subject` is that of its receipts, `stored_at` when the log stored it, `seq` where.

    `transaction`: what it belongs to, with its tenant's token, as `Cancels.holds` asks for them. `data` is as the record has it.
    """

    notification: Notification
    subject: str
    stored_at: datetime
    trace: str | None
    transaction: tuple[str, str] | None
    seq: int = 0
    data: msgspec.Raw = msgspec.Raw(b"{}")
    collapse_key: str | None = None


_NUL: Final = "=00"
"""In a token. PostgreSQL knows nobody whose name has a NUL, and nothing that is asked together with it would be answered."""

_tenant_of = functools.lru_cache(maxsize=1024)(decode_token)


def notifications_in(batch: Iterable[Delivered]) -> Iterator[Found]:
    """The notifications of a batch. What a user did is none, and neither is what somebody else wrote into a log.

    One that the dispatcher has found to be over (`never`) is decided already.
    """
    for stored in batch:
        try:
            entry = _decode(stored.payload)
            if entry.kind != "notification":
                continue
            is_over, channels = _said_by(bytes(entry.plan))
            if is_over:
                continue
            subject = stored.subject.decode()
            _, _, tenant, user = subject.split(".")
            if _NUL in subject and (_NUL in tenant or _NUL in user):
                continue
            yield Found(stored, entry, _tenant_of(tenant), tenant, user, channels)
        except (*_NO_RECORD, ValueError):
            continue


def goes_further(found: Found, rules: TenantRules) -> bool:
    """Whether there is something to decide beyond the app, where the record is already."""
    named = found.channels
    if named is None:
        rule = rules.rule_of(found.entry.type or "")
        named = tuple(rule.channels) if rule is not None else ()
    return any(map(INAPP.__ne__, named))


def user_of(found: Found) -> User | None:
    """Whose it is; None: nobody can have such a name, or no transaction the one that it names."""
    try:
        if (transaction := _cancellable(found)) is not None:
            encode_token(transaction)  # so that whoever asks about it need not fear that there is none of this name
        return found.tenant, decode_token(found.user_token)
    except InvalidToken:
        return None


def _cancellable(found: Found) -> str | None:
    """The transaction of a record. None, too, for a name with a NUL, which earlier versions let pass: nobody can cancel that."""
    transaction = found.entry.transaction_id
    return None if transaction is not None and "\0" in transaction else transaction


def due_of(found: Found, user: str) -> Due:
    """The record as it is decided about."""
    entry, transaction = found.entry, _cancellable(found)
    return Due(
        Notification(
            id=entry.id,
            tenant=found.tenant,
            user=user,
            type=entry.type or "",
            category=entry.category,
            priority=entry.priority,
            channels=found.channels,
            expires_at=entry.expires_at,
        ),
        found.subject,
        found.stored_at,
        entry.trace,
        None if transaction is None else (found.tenant_token, transaction),
        found.stored.seq,
        entry.data,
        entry.collapse_key,
    )


def _said(plan: bytes) -> tuple[bool, tuple[str, ...] | None]:
    """Whether a plan says that all is over, and the channels that the event asked for; None: it left the choice to the rule."""
    said = _read_plan(plan)
    is_over = bool(said) and all(one.when == "never" for one in said.values())
    # The default plan is the app.
    return is_over, None if INAPP in said and said[INAPP].why == "default" else tuple(said)


_said_again = functools.lru_cache(maxsize=1024)(_said)


def _said_by(plan: bytes) -> tuple[bool, tuple[str, ...] | None]:
    return _said_again(plan) if len(plan) <= PLAN_BYTES_REMEMBERED else _said(plan)


def receipt_of(
    due: Due, inputs: Inputs, decisions: Mapping[str, Decision], term: int, *, always: bool
) -> Outgoing | None:
    """The stored fact of a plan. None where it plans nothing but that the app shows the record, which every record says itself.

    Args:
        term: the planner's.
        always: write it nevertheless: an earlier planner may have written another plan down, and the higher term must win.
    """
    told = {name: one for name, one in decisions.items() if name != INAPP or one.when != "now"}
    if not told and not always:
        return None
    replayed = encode(narrowed(inputs))
    receipt = Receipt(
        user=due.notification.user,
        channel="",
        state=PLANNED,
        at=inputs.now,
        id=due.notification.id,
        trace=due.trace,
        term=term,
        plan={name: Planned(one.when, one.why) for name, one in (told or decisions).items()},
        inputs=msgspec.Raw(replayed) if len(replayed) <= INPUTS_BYTES_MAX else NO_INPUTS,
    )
    return receipt_message(due.subject, encode(receipt), due.trace)


def receipt_message(subject: str, payload: bytes, trace: str | None) -> Outgoing:
    """A receipt as it is stored."""
    # What is nearly always so is told at once: a trace that says of itself that it is not followed has no line.
    return Outgoing(subject, payload, trace_line(trace) if trace and not trace.endswith("-00") else b"")
