"""What a dispatcher does with a batch of events, decided without I/O: check, fan out, cut into atomic batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import structlog

from engine import metrics
from engine.broker import wire
from engine.broker.jetstream import Outgoing
from engine.limits import BATCH_BYTES_MAX, BATCH_MESSAGES_MAX, FAN_OUT_MESSAGES_MAX
from engine.log.marks import Mark
from engine.partition.reader import Delivered
from seamark.protocol import events
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import Accepted, Recipient
from seamark.protocol.limits import RECORD_BYTES_MAX
from seamark.protocol.records import NotificationTemplate, Withheld
from seamark.protocol.subjects import partition_of

_log = structlog.get_logger("seamark.dispatcher")

_MESSAGE_OVERHEAD_BYTES = 512
"""Protocol line, subject and batch headers of one message, generously."""


class Dead(NamedTuple):
    """An event that is refused, and why."""

    delivered: Delivered
    reason: str
    detail: str


class Planned(msgspec.Struct, frozen=True, gc=False):
    """An event with its records' template, ready to be claimed and fanned out."""

    seq: int
    accepted: Accepted
    template: NotificationTemplate


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One record to append: of event `seq`, for one recipient."""

    seq: int
    recipient: Recipient
    planned: Planned

    @property
    def is_of_many(self) -> bool:
        """Whether its event is for so many users that the first should not wait for a full batch."""
        return len(self.planned.accepted.recipients) >= FAN_OUT_MESSAGES_MAX

    def message(self, partition: int) -> Outgoing:
        token = self.recipient.token
        subject = f"log.{partition}.{self.planned.accepted.at.tenant_token}.{token}"
        template = self.planned.template
        return Outgoing(subject, template.body(self.recipient.user), template.lines)


class Batch(NamedTuple):
    """Messages of one atomic batch and the position they bring the partition to (see `Mark`)."""

    messages: list[Outgoing]
    seq: int
    user: str | None


@dataclass(slots=True)
class Round:
    """Consecutive events of one partition, checked. `last_seq` is where the home mark will stand afterwards."""

    planned: list[Planned] = field(default_factory=list)
    dead: list[Dead] = field(default_factory=list)
    last_seq: int = 0
    oldest_nanoseconds: int = 0


def rounds(batch: Iterable[Delivered], epoch: str) -> Iterator[Round]:
    """Cut a pulled batch into rounds whose home batch is usually one atomic batch."""
    current, records = Round(), 0
    for delivered in batch:
        outcome = plan(delivered, epoch)
        size = 1 if isinstance(outcome, Dead) else len(outcome.accepted.recipients)
        if records and records + size >= BATCH_MESSAGES_MAX:
            yield current
            current, records = Round(), 0
        records += size
        current.last_seq = delivered.seq
        current.oldest_nanoseconds = current.oldest_nanoseconds or delivered.time_nanoseconds
        if isinstance(outcome, Dead):
            current.dead.append(outcome)
        else:
            current.planned.append(outcome)
    if current.last_seq:
        yield current


def plan(delivered: Delivered, epoch: str) -> Planned | Dead:
    """Check one event in every respect that could fail; afterwards only passing failures remain."""
    try:
        headers = delivered.headers
        traceparent = wire.header(headers, b"traceparent")
        accepted = events.accept(
            delivered.subject.decode(),
            delivered.payload,
            traceparent,
            wire.header(headers, b"tracestate") if traceparent else None,
        )
        stored_at = datetime.fromtimestamp(delivered.time_nanoseconds / 1e9, UTC)
        template = NotificationTemplate(accepted, epoch, delivered.seq, stored_at)
        if template.size > RECORD_BYTES_MAX:
            return Dead(delivered, "size", f"a record of this event would have {template.size} bytes")
        return Planned(delivered.seq, accepted, template)
    except InvalidEvent as error:
        return Dead(delivered, error.reason, error.detail)
    except UnicodeDecodeError:
        return Dead(delivered, "subject", "the subject is not UTF-8")
    except Exception as error:
        # An event must never be able to stop its partition: what we did not foresee is a dead letter, and a bug to fix.
        _log.exception("event_not_planned", seq=delivered.seq)
        return Dead(delivered, "internal", f"{type(error).__name__} while planning")


def withhold(planned: Iterable[Planned], cancelled: Callable[[str, str], bool], now: datetime) -> None:
    """Have the records of events that are over or cancelled stored as shown to nobody.

    Args:
        cancelled: whether a tenant, named by its token, has cancelled a transaction.
        now: what expiry is compared with.
    """
    for one in planned:
        if one.template.withheld is not None:
            continue
        event = one.accepted.event
        transaction, expires_at = event.transaction_id, event.expires_at
        why: Withheld | None = None
        if transaction is not None and cancelled(one.accepted.at.tenant_token, transaction):
            why = "cancelled"
        elif expires_at is not None and expires_at <= now:
            why = "expired"
        if why is not None:
            one.template.withhold(why)
            metrics.withheld_records.labels(why).inc(len(one.accepted.recipients))


def fan_out(planned: Iterable[Planned], partitions: int) -> dict[int, list[Entry]]:
    """The records of each partition, by event and then by recipient's token: the order marks count in."""
    entries: dict[int, list[Entry]] = {}
    for event in planned:
        at = event.accepted.at
        for recipient in event.accepted.recipients:
            # A personal event's key is its user: the server has hashed these very tokens.
            own = recipient.token == at.key_token
            partition = at.partition if own else partition_of(at.tenant_token, recipient.token, partitions)
            entries.setdefault(partition, []).append(Entry(event.seq, recipient, event))
    return entries


def not_covered(entries: Sequence[Entry], mark: Mark) -> list[Entry]:
    """What a partition's mark does not say to be applied already. `entries` are in the order marks count in."""
    if not entries or entries[0].seq > mark.seq:
        return list(entries)
    return [entry for entry in entries if not mark.covers(entry.seq, entry.recipient.token)]


def batches(entries: Sequence[Entry], partition: int, last_seq: int) -> Iterator[Batch]:
    """Cut a partition's records into atomic batches; bodies are built as each batch is due, not before.

    Each batch says the position it brings the partition to: a user inside an event when the cut falls there, the event
    when it falls behind it, `last_seq` for the last one. There is always a last one, be it without records.
    """
    messages: list[Outgoing] = []
    size = 0
    for index, entry in enumerate(entries):
        message = entry.message(partition)
        cost = len(message.payload) + len(message.headers) + _MESSAGE_OVERHEAD_BYTES
        before = entries[index - 1] if index else entry
        inside = before.seq == entry.seq
        most = FAN_OUT_MESSAGES_MAX if inside and entry.is_of_many else BATCH_MESSAGES_MAX
        if messages and (len(messages) >= most - 1 or size + cost > BATCH_BYTES_MAX):
            yield Batch(messages, before.seq, before.recipient.token if inside else None)
            messages, size = [], 0
            message = entry.message(partition)  # as it is now: it may be withheld since
        messages.append(message)
        size += cost
    yield Batch(messages, last_seq, None)
