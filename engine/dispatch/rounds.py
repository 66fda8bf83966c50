"""What a dispatcher does with a batch of events, decided without I/O: check, fan out, cut into atomic batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
import structlog

from engine import metrics
from engine.broker.jetstream import Outgoing, Stored
from engine.dispatch.following import Following, following, not_followed, trace_in
from engine.dispatch.later import NotPutOff, Page, PutOff, behind, moment_of, origin_of, part_of, waiting_tenth
from engine.dispatch.source import Place
from engine.limits import (
    BATCH_BYTES_MAX,
    BATCH_MESSAGES_MAX,
    CLAIM_SECONDS,
    FAN_OUT_FIRST_MESSAGES_MAX,
    FAN_OUT_MESSAGES_MAX,
)
from engine.log.marks import Mark
from engine.partition.worker import Delivered, delivered
from engine.traces.lines import about_followed
from engine.traces.spans import Spans
from seamark.protocol import events
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import Accepted, Recipient
from seamark.protocol.limits import RECORD_BYTES_MAX
from seamark.protocol.records import NotificationTemplate
from seamark.protocol.subjects import partitions_of

_log = structlog.get_logger("seamark.dispatcher")

_MESSAGE_OVERHEAD_BYTES = 512
"""Protocol line, subject and batch headers of one message, generously."""


STEP_BYTES = 16 << 10
"""Of the body of an event: a larger one may be for so many users that it is planned by steps."""

STEP_RECIPIENTS = 1000
"""Recipients for whom records are made at a time: 2 ms on an idle core."""

TOLD_MAX = 256
"""Tenants, each with a field, of which the log tells that their events hold what nobody may publish any more."""

_told: set[tuple[str, str]] = set()

End = tuple[int, str | None]
"""Where a round leaves its places: behind a message, or behind a part of it."""


class Dead(NamedTuple):
    """An event that is refused, and why."""

    delivered: Delivered
    reason: str
    detail: str


class Planned(msgspec.Struct, frozen=True, gc=False):
    """An event with its records' template, ready to be claimed and fanned out.

    Attributes:
        later: the event as it is stored, where it has to be put off.
        part: what the parts of an event begin with that was put off; `seq` is that of its wake-up then.
        claimed: the positions under which its id was claimed before it was due.
        following: how it is followed through the processes; None: it is not.
    """

    seq: int
    accepted: Accepted
    template: NotificationTemplate
    later: Delivered | None = None
    part: str = ""
    claimed: tuple[str, ...] = ()
    following: Following | None = None


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One record to append: of event `seq`, for one recipient."""

    seq: int
    recipient: Recipient
    planned: Planned

    @property
    def part(self) -> str:
        """Which part of message `seq` this is, in the order marks count in."""
        return self.planned.part + self.recipient.token

    @property
    def event_part(self) -> str:
        """What the parts of its event begin with."""
        return self.planned.part

    def most(self, inside: bool) -> int:
        """How many messages its batch may have. `inside`: the batch holds other records of its event.

        Of an event for very many users the first should not wait for a full batch.
        """
        of_many = inside and len(self.planned.accepted.recipients) >= FAN_OUT_MESSAGES_MAX
        return FAN_OUT_MESSAGES_MAX if of_many else BATCH_MESSAGES_MAX

    def message(self, place: Place) -> Outgoing:
        token = self.recipient.token
        subject = f"log.{place}.{self.planned.accepted.at.tenant_token}.{token}"
        template, follow = self.planned.template, self.planned.following
        message = Outgoing(subject, template.body(self.recipient.user), template.lines)
        followed = follow is None or follow.users is None or token in follow.users
        return message if followed else not_followed(message)


class Batch(NamedTuple):
    """Messages of one atomic batch and the position they bring their place to (see `Mark`)."""

    messages: list[Outgoing]
    seq: int
    user: str | None


@dataclass(slots=True)
class Round:
    """Consecutive events of one partition, checked.

    `last_seq` and `last_part` are where the home mark will stand afterwards. `puts_off`: some of its events are not due yet.
    """

    planned: list[Planned] = field(default_factory=list)
    dead: list[Dead] = field(default_factory=list)
    last_seq: int = 0
    oldest_nanoseconds: int = 0
    last_part: str | None = None
    puts_off: bool = False

    @property
    def end(self) -> End:
        """Where its places stand behind it."""
        return self.last_seq, self.last_part


def rounds(batch: Iterable[Delivered], epoch: str, spans: Spans | None = None) -> Iterator[Round]:
    """Cut a pulled batch into rounds whose home batch is usually one atomic batch. `spans`: says which events are followed."""
    return (round_ for round_ in rounds_by_steps(batch, epoch, spans) if round_ is not None)


def rounds_by_steps(batch: Iterable[Delivered], epoch: str, spans: Spans | None = None) -> Iterator[Round | None]:
    """The same. None: something else may be done before an event for very many users is planned any further."""
    current, records = Round(), 0
    for event in batch:
        recipients = (yield from events.recipients_by_steps(event.payload)) if len(event.payload) > STEP_BYTES else None
        outcome = plan(event, epoch, spans, recipients)
        size = 1 if isinstance(outcome, Dead) else len(outcome.accepted.recipients)
        if records and records + size >= BATCH_MESSAGES_MAX:
            yield current
            current, records = Round(), 0
        records += size
        current.last_seq = event.seq
        current.oldest_nanoseconds = current.oldest_nanoseconds or event.time_nanoseconds
        if isinstance(outcome, Dead):
            current.dead.append(outcome)
        else:
            current.planned.append(outcome)
            current.puts_off = current.puts_off or outcome.later is not None
    if current.last_seq:
        yield current


def due_rounds(page: Page, wake_up: Delivered, *, last: bool, spans: Spans | None = None) -> Iterator[Round]:
    """Cut events that are due by a wake-up into rounds. `last`: nothing else is due by it."""
    current, records = Round(last_seq=wake_up.seq), 0
    for stored in page.events:
        outcome = plan_due(stored, wake_up, spans)
        size = 1 if isinstance(outcome, Dead) else len(outcome.accepted.recipients)
        if records and records + size >= BATCH_MESSAGES_MAX:
            yield current
            current, records = Round(last_seq=wake_up.seq), 0
        records += size
        current.last_part = behind(page.tenth, stored.seq)
        current.oldest_nanoseconds = int(moment_of(page.tenth).timestamp() * 1e9)
        if isinstance(outcome, Dead):
            current.dead.append(outcome)
        else:
            current.planned.append(outcome)
    if last:
        current.last_part = None
    yield current


def plan(
    event: Delivered, epoch: str, spans: Spans | None = None, recipients: list[Recipient] | None = None
) -> Planned | Dead:
    """Check one event in every respect that could fail; afterwards only passing failures remain.

    Whether it is put off follows from when it was stored, not from a clock: whoever reads it again must decide the same.
    """
    try:
        stored_at = datetime.fromtimestamp(event.time_nanoseconds / 1e9, UTC)
        planned = _planned(event, epoch, event.seq, stored_at, spans, recipients)
        send_at = planned.accepted.event.send_at
        if send_at is None or send_at <= stored_at:
            return planned
        events.check_send_at(planned.accepted.event, stored_at)
        return msgspec.structs.replace(planned, later=event)
    except Exception as error:
        return _dead(event, error)


def plan_due(stored: Stored, wake_up: Delivered, spans: Spans | None = None) -> Planned | Dead:
    """The same of an event that was put off and is due. Its records say where it was when it was published."""
    event = delivered(stored)

    try:
        tenth, origin = waiting_tenth(stored.subject), origin_of(event.headers)
        published, due_at = msgspec.structs.replace(event, subject=origin.subject), moment_of(tenth)
        woken_at = datetime.fromtimestamp(wake_up.time_nanoseconds / 1e9, UTC)
        if woken_at > due_at + timedelta(seconds=CLAIM_SECONDS):
            return Dead(published, "late", f"it was due at {due_at.isoformat()}: who sent it first is forgotten by now")
        planned = _planned(published, *origin.place, due_at, spans)
        part = part_of(tenth, stored.seq)
        return msgspec.structs.replace(planned, seq=wake_up.seq, part=part, claimed=origin.positions)
    except Exception as error:
        return _dead(event, error)


def _planned(
    event: Delivered,
    epoch: str,
    seq: int,
    at: datetime,
    spans: Spans | None,
    recipients: list[Recipient] | None = None,
) -> Planned:
    """What becomes of an event that was published as `seq` of the stream's incarnation `epoch`.

    Raises:
        InvalidEvent, UnicodeDecodeError: the latter of the subject.
    """
    traceparent, tracestate = trace_in(event.headers)
    accepted = events.accept(event.subject.decode(), event.payload, traceparent, tracestate, recipients)
    if accepted.unfit:
        _tell(accepted)
    follow = None
    if spans is not None:
        accepted, follow = following(spans, accepted, event.time_nanoseconds)
    template = NotificationTemplate(accepted, epoch, seq, at)
    if template.size > RECORD_BYTES_MAX:
        raise InvalidEvent("size", f"a record of this event would have {template.size} bytes")
    return Planned(event.seq, accepted, template, following=follow)


def _tell(accepted: Accepted) -> None:
    """Count what is unfit in an event, and log it once for each tenant and field: a publisher may do it again and again."""
    for one in accepted.unfit:
        metrics.unfit_events.labels(one.reason).inc()
        about = accepted.at.tenant, one.reason
        if about not in _told and len(_told) < TOLD_MAX:
            _told.add(about)
            _log.warning(
                "event_unfit", tenant=about[0], event_id=accepted.event.id, type=accepted.at.type, why=one.detail
            )


def _dead(event: Delivered, error: Exception) -> Dead:
    """To be called where `error` is caught."""
    match error:
        case InvalidEvent():
            return Dead(event, error.reason, error.detail)
        case NotPutOff():
            return Dead(event, "not_put_off", str(error))
        case UnicodeDecodeError():
            return Dead(event, "subject", "the subject is not UTF-8")
    # An event must never be able to stop its partition: what we did not foresee is a dead letter, and a bug to fix.
    with about_followed(trace_in(event.headers)[0]):
        _log.exception("event_not_planned", seq=event.seq)
    return Dead(event, "internal", f"{type(error).__name__} while planning")


Entries = dict[Place, list[Entry | PutOff]]


def fan_out(planned: Iterable[Planned], partitions: int) -> Entries:
    """The records of each partition, by event and then by recipient's token: the order marks count in."""
    entries: Entries = {}
    for _ in fan_out_by_steps(planned, partitions, entries):
        pass
    return entries


def fan_out_by_steps(planned: Iterable[Planned], partitions: int, entries: Entries) -> Iterator[None]:
    """The same, into `entries`; between two steps, which take some milliseconds at most, something else may be done."""
    for event in planned:
        at, recipients = event.accepted.at, event.accepted.recipients
        if len(recipients) == 1 and recipients[0].token == at.key_token:
            # A personal event's key is its user: the server has hashed these very tokens.
            entries.setdefault(at.partition, []).append(Entry(event.seq, recipients[0], event))
            continue
        for start in range(0, len(recipients), STEP_RECIPIENTS):
            if start:
                yield
            some = recipients[start : start + STEP_RECIPIENTS]
            places = partitions_of(at.tenant_token, [recipient.token for recipient in some], partitions)
            for recipient, partition in zip(some, places, strict=True):
                entries.setdefault(partition, []).append(Entry(event.seq, recipient, event))


def not_covered(entries: Sequence[Entry | PutOff], mark: Mark) -> list[Entry | PutOff]:
    """What a place's mark does not say to be applied already. `entries` are in the order marks count in."""
    if not entries or entries[0].seq > mark.seq:
        return list(entries)
    return [entry for entry in entries if not mark.covers(entry.seq, entry.part)]


def _begins_with_many(entries: Sequence[Entry | PutOff]) -> bool:
    """Whether the first event has more records here than one batch takes: then those who come first wait for a small one only."""
    if len(entries) < FAN_OUT_MESSAGES_MAX:
        return False
    first, last = entries[0], entries[FAN_OUT_MESSAGES_MAX - 1]
    return (first.seq, first.event_part) == (last.seq, last.event_part)


def batches(
    entries: Sequence[Entry | PutOff],
    place: Place,
    last_seq: int,
    last_part: str | None = None,
    most: Callable[[], int] = lambda: BATCH_MESSAGES_MAX,
) -> Iterator[Batch]:
    """Cut the entries of a place into atomic batches; bodies are built as each batch is due, not before.

    Each batch says the position it brings the place to: a part of a message when the cut falls inside it, the message
    when it falls behind it, `last_seq` and `last_part` for the last one. There is always a last one, be it without messages.
    `most`: how many messages the batch that is built now may have. The first one is smaller where an event for many begins.
    """
    messages: list[Outgoing] = []
    size, allowed = 0, most()
    if _begins_with_many(entries):
        allowed = min(allowed, FAN_OUT_FIRST_MESSAGES_MAX)
    for index, entry in enumerate(entries):
        message = entry.message(place)
        cost = len(message.payload) + len(message.headers) + _MESSAGE_OVERHEAD_BYTES
        number = len(messages)
        # No entry allows fewer, so below that none is asked.
        full = number >= allowed - 1 or size + cost > BATCH_BYTES_MAX
        if number and (full or number >= FAN_OUT_MESSAGES_MAX - 1):
            before = entries[index - 1]
            inside = before.seq == entry.seq
            if full or number >= entry.most(inside) - 1:
                yield Batch(messages, before.seq, before.part if inside else None)
                messages, size, allowed = [], 0, most()
                message = entry.message(place)  # as it is now: it may be withheld since
        messages.append(message)
        size += cost
    yield Batch(messages, last_seq, last_part)
