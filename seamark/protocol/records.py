"""Records: the entries of a user's log, as JSON that operators can read and the gateway forwards undecoded."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from seamark.protocol.events import INAPP, Accepted, new_event_id

Kind = Literal["notification", "read", "archive", "recall"]

SKIP_LINE = b"Seamark-Skip: 1\r\n"
"""Header of a record that is not for the screen: the gateway sends its position, not its body."""

SKIP_AFTER_HEADER = "Seamark-Skip-After"
"""Header of a record that expires, and when, in Unix milliseconds: a gateway that reads it later sends its position only.

One with a collapse key has none. It supersedes earlier records also after it has expired, so devices must see it."""

Withheld = Literal["cancelled", "expired"]
"""Why a record is stored, but shown to nobody."""

EPOCH_HEADER = "Seamark-Epoch"
"""Header of a record: the incarnation of the log it was written for. Its live copies are then never taken for another's."""

_encode = msgspec.json.Encoder().encode


def epoch_line(epoch: str) -> bytes:
    """`EPOCH_HEADER` as a line. Every record is stored with it, so it has no blank to spare."""
    return f"{EPOCH_HEADER}:{epoch}\r\n".encode()


class EventPosition(msgspec.Struct, gc=False):
    """Where in EVENTS the event of a record is."""

    epoch: str
    seq: int


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An entry of a log, for those who decode it (projections, tools). Fields are only ever appended."""

    id: str
    kind: str
    tenant: str
    user: str
    at: datetime
    type: str | None = None
    category: str | None = None
    priority: str | None = None
    event: EventPosition | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")
    plan: dict[str, dict[str, Any]] = {}
    collapse_key: str | None = None
    expires_at: datetime | None = None
    trace: str | None = None
    ids: list[str] = []
    up_to: int | None = None
    device: str | None = None
    transaction_id: str | None = None


decode_record = msgspec.json.Decoder(Record).decode


_REST = b'%b,"type":%b,"category":%b,"priority":%b,"at":%b,"event":{"epoch":%b,"seq":%d},"data":%b%b}'
"""What follows the user in a notification record, from the plan on. To make an object of it first takes three times as long."""


class NotificationTemplate:
    """The notification records of one event: what comes before the user and what comes after, built once for all of them.

    Args:
        accepted: the event.
        epoch, seq: its place in EVENTS.
        stored_at: when EVENTS stored it; the record's time where the event has none, so that a repetition gives equal bytes.
    """

    __slots__ = ("_after", "_before", "_channels", "_plan_bytes", "lines", "withheld")

    def __init__(self, accepted: Accepted, epoch: str, seq: int, stored_at: datetime) -> None:
        event, at = accepted.event, accepted.at
        self._before = b'{"id":%b,"kind":"notification","tenant":%b,"user":' % (_encode(event.id), _encode(at.tenant))
        expires_at = None if event.expires_at is None else event.expires_at.astimezone(UTC)
        more = lines = b""
        if event.collapse_key is not None:
            more += b',"collapse_key":%b' % _encode(event.collapse_key)
        if expires_at is not None:
            more += b',"expires_at":%b' % _encode(expires_at)
        if accepted.traceparent:
            more += b',"trace":%b' % _encode(accepted.traceparent.decode())
            lines = b"traceparent: %b\r\n" % accepted.traceparent
            if accepted.tracestate:
                lines += b"tracestate: %b\r\n" % accepted.tracestate
        if event.transaction_id is not None:
            more += b',"transaction_id":%b' % _encode(event.transaction_id)
        if event.channels is not None and INAPP not in event.channels:
            lines += SKIP_LINE
        elif expires_at is not None and not event.collapse_key:
            lines += b"%b:%d\r\n" % (SKIP_AFTER_HEADER.encode(), int(expires_at.timestamp() * 1000))
        self.withheld: Withheld | None = None
        self._channels = event.channels
        plan = _plan(event.channels)
        self._plan_bytes = len(plan)
        self._after = _REST % (
            plan,
            _encode(at.type),
            _encode(event.category),
            _encode(event.priority),
            _encode(stored_at if event.time is None else event.time.astimezone(UTC)),
            _encode(epoch),
            seq,
            one_line(event.data),
            more,
        )
        self.lines = lines

    def withhold(self, why: Withheld) -> None:
        """Make records that no device is shown: a stored fact, with the reason, in the place of a notification."""
        self.withheld = why
        plan = _PLAN % _encode({channel: {"when": "never", "why": why} for channel in self._channels or [INAPP]})
        self._after = plan + self._after[self._plan_bytes :]
        self._plan_bytes = len(plan)
        if SKIP_LINE not in self.lines:
            self.lines += SKIP_LINE

    @property
    def size(self) -> int:
        """Bytes of a record, without its user."""
        return len(self._before) + len(self._after)

    def body(self, user: str) -> bytes:
        """The record of one user."""
        return self._before + _encode(user) + self._after


def one_line(data: msgspec.Raw) -> msgspec.Raw:
    """`data` without raw line breaks: a record is one line, so that SSE can carry it as it stands."""
    text = bytes(data)
    # By `find`, which every record needs twice: `in` first tries to take what is sought for a number, and takes twice as long.
    broken = text.find(b"\n") >= 0 or text.find(b"\r") >= 0
    return msgspec.Raw(msgspec.json.format(text, indent=-1)) if broken else data


_PLAN = b',"plan":%b'
_DEFAULT_PLAN = _PLAN % _encode({INAPP: {"when": "now", "why": "default"}})


def _plan(channels: list[str] | None) -> bytes:
    """Which channels and why, part of the record so that no side effect has to guess it later."""
    if channels is None:
        return _DEFAULT_PLAN
    return _PLAN % _encode({channel: {"when": "now", "why": "requested"} for channel in channels})


def state_record(
    kind: Literal["read", "archive", "recall"],
    *,
    tenant: str,
    user: str,
    device: str | None,
    ids: Sequence[str] = (),
    up_to: int | None = None,
    record_id: str | None = None,
    at: datetime | None = None,
    trace: str | None = None,
) -> tuple[str, bytes]:
    """A `read`, `archive` or `recall` record: its id and its bytes. Devices converge by replaying it like any other record.

    Args:
        ids: records it covers, or
        up_to: the last sequence it covers.
        trace: `traceparent` of what has it stored.
    """
    record = Record(
        id=record_id or new_event_id(),
        kind=kind,
        tenant=tenant,
        user=user,
        at=at or datetime.now(UTC),
        ids=list(ids),
        up_to=up_to,
        device=device,
        trace=trace,
    )
    return record.id, _encode(record)
