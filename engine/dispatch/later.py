"""Events that are put off until they are due: how LATER keeps them, and how they are found again (ADR 0037).

Time is cut into tenths of a second, and these into slots of five. LATER keeps an event under the tenth it is due in. Beside it
stands one schedule for each slot, which the broker turns into a *wake-up* when the time has come: what waits in that slot behind
the wake-up before, and before this one in the stream, is due. A schedule that is replaced or fires twice loses and adds nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import msgspec

from engine.broker import wire
from engine.broker.jetstream import Broker, Outgoing, Stored
from engine.errors import Unanswered
from engine.limits import BATCH_MESSAGES_MAX, DUE_SECONDS, PULL_BYTES
from engine.partition.worker import Delivered
from seamark.protocol.cursor import Cursor, parse_cursor
from seamark.protocol.errors import SeamarkError
from seamark.protocol.events import Accepted
from seamark.protocol.subjects import LATER_STREAM, schedule_subject, waiting_subject, wake_up_subject

SUBJECT: Final = b"Seamark-Subject"
"""Header of an event that waits: the subject it was stored under. In its own subject it would be one in the broker's memory."""

POSITIONS: Final = b"Seamark-Positions"
"""Another: where it is, `<epoch>.<seq>` of its source. Where it was before restores may follow."""

SLOT_TENTHS: Final = 5
"""Tenths that share a schedule. The broker fires some 110 a second where an fsync takes 4 ms, and 16 partitions need 32 so."""

EARLY: Final = timedelta(milliseconds=250)
"""How long before its slot begins a wake-up is due: the broker fires at most every 250 ms, and takes what is overdue then."""

MARGIN_SECONDS: Final = 3600
"""So much earlier than wake-ups, events leave LATER: one that outlived its wake-up would be due once more with the next."""

_START: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TENTH: Final = timedelta(milliseconds=100)


class NotPutOff(SeamarkError):
    """A message where events wait, or wake-ups come, that no dispatcher has put there."""


class PutOff(msgspec.Struct, frozen=True, gc=False):
    """An event on its way to LATER: an entry of a batch, as a record is.

    Attributes:
        tenth: when it is due. seconds: how long that is from now.
    """

    seq: int
    accepted: Accepted
    event: Delivered
    positions: Sequence[str]
    tenth: int
    seconds: float
    part: str = ""
    """There are no parts of it."""
    event_part: str = ""

    def most(self, _inside: bool) -> int:
        """Each may bring a schedule with it."""
        return BATCH_MESSAGES_MAX // 2

    def message(self, _place: object) -> Outgoing:
        """The event as it waits."""
        kept = int(max(0.0, self.seconds)) + DUE_SECONDS - MARGIN_SECONDS
        lines = [
            b"Nats-TTL:%ds" % kept,
            b"%b:%b" % (SUBJECT, self.event.subject),
            b"%b:%b" % (POSITIONS, " ".join(self.positions).encode()),
        ]
        if self.accepted.traceparent:
            lines.append(b"traceparent:%b" % self.accepted.traceparent)
        if self.accepted.tracestate:
            lines.append(b"tracestate:%b" % self.accepted.tracestate)
        subject = waiting_subject(self.accepted.at.partition, self.tenth, self.accepted.at.tenant_token)
        return Outgoing(subject, self.event.payload, b"\r\n".join([*lines, b""]))


def put_off(event: Delivered, accepted: Accepted, send_at: datetime, positions: Sequence[str], now: datetime) -> PutOff:
    """An event as it is to wait. What is overdue already waits in the present tenth, so that few slots are woken again."""
    tenth = tenth_of(max(send_at, now))
    return PutOff(event.seq, accepted, event, positions, tenth, (moment_of(tenth) - now).total_seconds())


def with_schedules(messages: Iterable[Outgoing]) -> list[Outgoing]:
    """The events of a batch, and the schedules of their slots, each once."""
    found = list(messages)
    slots: dict[tuple[int, int], None] = {}
    for message in found:
        _, q, tenth, _ = message.subject.split(".")
        slots[int(q), int(tenth) // SLOT_TENTHS] = None
    return found + [_schedule(q, slot) for q, slot in slots]


def _schedule(event_partition: int, slot: int) -> Outgoing:
    at = moment_of(slot * SLOT_TENTHS) - EARLY
    lines = (
        b"Nats-Schedule:@at %b" % at.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode(),
        b"Nats-Schedule-Target:%b" % wake_up_subject(event_partition, slot).encode(),
        b"Nats-Schedule-TTL:%ds" % DUE_SECONDS,
        b"",
    )
    return Outgoing(schedule_subject(event_partition, slot), b"", b"\r\n".join(lines))


# --- time, and positions inside a slot -----------------------------------------------------------------------------------


def tenth_of(moment: datetime) -> int:
    """The first tenth of a second that does not begin before `moment`, since 1970."""
    return -((_START - moment) // _TENTH)


def moment_of(tenth: int) -> datetime:
    """When a tenth begins."""
    return _START + tenth * _TENTH


def part_of(tenth: int, seq: int = 0) -> str:
    """What the parts of one waiting event begin with, in the order they are dispatched in; users' tokens follow."""
    return f"{tenth % SLOT_TENTHS}.{seq:020d}."


def behind(tenth: int, seq: int) -> str:
    """The part behind all parts of a waiting event: no token holds a `~`, and all sort before it."""
    return f"{part_of(tenth, seq)}~"


def reached(part: str) -> tuple[int, int]:
    """The tenth of its slot, and the event, that a part is of."""
    tenth, seq, _ = part.split(".", 2)
    return int(tenth), int(seq)


# --- reading -------------------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What an event that is due now was before: its `subject`, its `place` in its source, and all `positions` of its claim."""

    subject: bytes
    place: Cursor
    positions: tuple[str, ...]


def origin_of(headers: bytes) -> Origin:
    """What came with an event that waited.

    Raises:
        NotPutOff: nothing did.
    """
    positions = tuple((wire.header(headers, POSITIONS) or b"").decode("ascii", "replace").split())
    try:
        return Origin(wire.header(headers, SUBJECT) or b"", parse_cursor(positions[0]), positions)
    except (ValueError, IndexError, SeamarkError) as error:
        raise NotPutOff("it does not say where the event was before it was due") from error


def waiting_tenth(subject: str) -> int:
    """The tenth that an event waits for.

    Raises:
        NotPutOff: no dispatcher writes such a subject.
    """
    parts = subject.split(".")
    if len(parts) != 4 or not parts[2].isdecimal():
        raise NotPutOff("nothing waits under such a subject")
    return int(parts[2])


def slot_of(wake_up: Delivered) -> int:
    """The slot that a wake-up is for.

    Raises:
        NotPutOff: it is none.
    """
    word = wake_up.subject.rpartition(b".")[2]
    if not word.isdigit():
        raise NotPutOff("it names no slot")
    return int(word)


class Page(NamedTuple):
    """Some of the events that wait for one tenth, in the order they were put off."""

    tenth: int
    events: list[Stored]


async def due_by(
    broker: Broker, event_partition: int, wake_up: Delivered, done: str | None = None
) -> AsyncGenerator[Page]:
    """What a wake-up says to be due, tenth by tenth.

    Args:
        done: the part up to which that was dispatched; the event it is of comes again.

    Raises:
        BrokerError: ask again; Unanswered also where the leader does not show the wake-up itself yet.
    """
    slot = slot_of(wake_up)
    floor = await _woken_before(broker, wake_up)
    first, begun = (0, 0) if done is None else reached(done)
    for tenth in range(slot * SLOT_TENTHS + first, (slot + 1) * SLOT_TENTHS):
        subject, seq, begun = waiting_subject(event_partition, tenth), max(floor + 1, begun), 0
        while events := await _page(broker, subject, seq, wake_up.seq):
            yield Page(tenth, events)
            seq = events[-1].seq + 1


async def _woken_before(broker: Broker, wake_up: Delivered) -> int:
    """The wake-up of the same slot before this one, 0 for none. A leader that shows this one shows all that it is for."""
    subject, floor = wake_up.subject.decode(), 0
    while True:
        found = await broker.leader_next(LATER_STREAM, subject, floor + 1)
        if found is None or found.seq > wake_up.seq:
            raise Unanswered(f"the leader of {LATER_STREAM} does not show wake-up {wake_up.seq}")
        if found.seq == wake_up.seq:
            return floor
        floor = found.seq


async def _page(broker: Broker, subject: str, seq: int, end: int) -> list[Stored]:
    """The next events below `end`. The leader says which is first, for any replica may lag behind it."""
    first = await broker.leader_next(LATER_STREAM, subject, seq)
    if first is None or first.seq >= end:
        return []
    number = BATCH_MESSAGES_MAX - 1  # one atomic batch, if each is for one user
    page = (await broker.next_by_subject(LATER_STREAM, subject, first.seq, batch=number, max_bytes=PULL_BYTES)).records
    events = page if page and page[0].seq == first.seq else [first]
    return [stored for stored in events if stored.seq < end]
