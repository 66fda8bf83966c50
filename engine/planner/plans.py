"""What a planner makes of records, without I/O: which of them it decides about, from what, and what it writes down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

import msgspec

from engine.broker.jetstream import Outgoing
from engine.partition.worker import Delivered
from engine.plan.decide import narrowed
from engine.plan.decisions import Decision, Facts, Inputs, Kill, Notification
from engine.plan.preferences import TenantDefaults
from engine.plan.profile import Profile
from engine.plan.rules import Channel, TypeRule
from seamark.protocol.errors import InvalidToken
from seamark.protocol.events import INAPP, EventId, Label, Priority
from seamark.protocol.receipts import NO_INPUTS, PLANNED, Planned, Receipt
from seamark.protocol.subjects import decode_token

INPUTS_BYTES_MAX: Final = 16 << 10
"""What a plan was decided from is stored with it, if it is no larger: a user with thousands of suppressed addresses must not make
receipts that the stream refuses."""

WEBHOOK: Final = "webhook"

_NO_RECORD: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidToken)

User = tuple[str, str]
"""Tenant and user."""


class TenantRules(Protocol):
    """What a tenant says of its notifications."""

    @property
    def defaults(self) -> TenantDefaults:
        """What holds for users who have said nothing."""

    def rule_of(self, type: str, /) -> TypeRule | None:
        """The rule of a type, if it has one."""

    def templates_of(self, type: str, /) -> tuple[Channel, ...]:
        """The channels for which a type has a template."""

    def webhook_of(self, type: str, /) -> bool:
        """Whether an endpoint of the tenant itself gets this type."""


class _Said(msgspec.Struct, gc=False):
    """What a record says of a channel already."""

    when: str = ""
    why: str = ""


class _Entry(msgspec.Struct, gc=False):
    """The part of a record that a decision needs."""

    id: EventId
    kind: str
    type: str | None = None
    category: Label | None = None
    priority: Priority = "normal"
    plan: dict[str, _Said] = {}
    expires_at: datetime | None = None
    trace: str | None = None


_decode = msgspec.json.Decoder(_Entry).decode
_encode = msgspec.json.Encoder().encode


class Due(NamedTuple):
    """A record to decide about. `subject` is that of its receipts, `seq` its place in the log."""

    notification: Notification
    subject: str
    seq: int
    stored_at: datetime
    trace: str | None

    @property
    def user(self) -> User:
        """Whose it is."""
        return self.notification.tenant, self.notification.user


def due_in(batch: Iterable[Delivered]) -> Iterator[Due]:
    """The notifications of a batch. What a user did is none, and neither is what somebody else wrote into a log.

    One that the dispatcher has found to be over (`never`) is decided already.
    """
    for stored in batch:
        try:
            entry = _decode(stored.payload)
            if entry.kind != "notification" or (entry.plan and all(one.when == "never" for one in entry.plan.values())):
                continue
            _, place = stored.subject.decode().split(".", 1)
            _, tenant, user = place.split(".")
            notification = Notification(
                id=entry.id,
                tenant=decode_token(tenant),
                user=decode_token(user),
                type=entry.type or "",
                category=entry.category,
                priority=entry.priority,
                channels=_requested(entry.plan),
                expires_at=entry.expires_at,
            )
        except (*_NO_RECORD, ValueError):
            continue
        yield Due(
            notification,
            f"rcpt.{place}",
            stored.seq,
            datetime.fromtimestamp(stored.time_nanoseconds / 1e9, UTC),
            entry.trace,
        )


def _requested(plan: Mapping[str, _Said]) -> tuple[str, ...] | None:
    """The channels that the event asked for. One that left the choice to the rule has the default plan: the app."""
    return None if INAPP in plan and plan[INAPP].why == "default" else tuple(plan)


def goes_further(due: Due, rules: TenantRules) -> bool:
    """Whether there is something to decide beyond the app, where the record is already."""
    rule = rules.rule_of(due.notification.type)
    named = due.notification.channels
    if named is None:
        named = tuple(rule.channels) if rule is not None else ()
    return any(channel != INAPP for channel in named)


def inputs_of(due: Due, rules: TenantRules, profile: Profile, kills: tuple[Kill, ...], now: datetime) -> Inputs:
    """What a record's plan is decided from."""
    type = due.notification.type
    if WEBHOOK not in profile.reach and rules.webhook_of(type):
        profile = msgspec.structs.replace(profile, reach=(*profile.reach, "webhook"))
    return Inputs(
        now=now,
        notification=due.notification,
        facts=Facts(stored_at=due.stored_at),
        rule=rules.rule_of(type),
        profile=profile,
        defaults=rules.defaults,
        templates=rules.templates_of(type),
        kills=kills,
    )


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
    replayed = _encode(narrowed(inputs))
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
    return Outgoing(due.subject, _encode(receipt))
