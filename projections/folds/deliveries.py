"""What is known of one delivery, whatever the order in which its facts arrive.

One delivery is a (notification, user, channel, device). Facts are merged by rank: the higher one says the state, so merging
is commutative, associative and idempotent, and a receipt that comes late, twice or first changes nothing else.

- Proof of arrival wins over everything: delivered < acknowledged < seen < read.
- Below it the later attempt wins over the earlier one, and within one attempt
  queued < ambiguous < suppressed < cancelled < expired < sent < failed: what was sent is no longer cancelled, and what a
  provider took may still come back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from engine.partition.reader import Delivered
from projections.folds.changes import NO_RECORD, clean
from projections.folds.inbox import SEQ_MAX, User, user_of, zoned
from seamark.protocol.errors import InvalidToken
from seamark.protocol.receipts import Receipt, decode_receipt

_BELOW: Final = ("queued", "ambiguous", "suppressed", "cancelled", "expired", "sent", "failed")
_ARRIVED: Final = ("delivered", "acknowledged", "seen", "read")
STATES: Final = (*_BELOW, *_ARRIVED)
ATTEMPTS_MAX: Final = 1_000_000

DEVICES_MAX: Final = 50
"""How many devices of a user have a remembered cursor: those that acknowledged last. A client chooses its device's name, and no
person has more devices than twice the sessions that a user may have open."""

_ARRIVAL: Final = (ATTEMPTS_MAX + 1) * 10


def rank(state: str, attempt: int = 0) -> int:
    """Where a fact stands among those of one delivery: the highest is its state.

    Raises:
        ValueError: no such state.
    """
    if state in _ARRIVED:
        return _ARRIVAL + _ARRIVED.index(state)
    return max(0, min(attempt, ATTEMPTS_MAX)) * 10 + _BELOW.index(state)


Key = tuple[str, str, str, str, str]
"""Tenant, user, id, channel, device."""


@dataclass(slots=True)
class Delivery:
    """Everything known of one delivery. Fields are columns of the table `deliveries`."""

    rank: int
    state: str
    reason: str
    provider: str
    trace: str
    at: datetime
    attempts: int
    sent_at: datetime | None = None
    delivered_at: datetime | None = None
    acknowledged_at: datetime | None = None
    seen_at: datetime | None = None
    read_at: datetime | None = None

    def merge(self, other: Delivery) -> None:
        """Take in what `other` knows. Of two facts with one rank the earlier says when and why."""
        for name in _TIMES:
            times = [at for at in (getattr(self, name), getattr(other, name)) if at is not None]
            setattr(self, name, min(times, default=None))
        self.attempts = max(self.attempts, other.attempts)
        if _order(other) > _order(self):
            self.rank, self.state, self.at = other.rank, other.state, other.at
            self.reason, self.provider, self.trace = other.reason, other.provider, other.trace


_TIMES: Final = ("sent_at", "delivered_at", "acknowledged_at", "seen_at", "read_at")
_UNIX: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _order(one: Delivery) -> tuple[int, float, str, str, str]:
    return (one.rank, -(one.at - _UNIX).total_seconds(), one.reason, one.provider, one.trace)


def delivery_of(receipt: Receipt) -> Delivery:
    """What one receipt of a channel knows."""
    at = zoned(receipt.at) or receipt.at
    fact = Delivery(
        rank=rank(receipt.state, receipt.attempt),
        state=receipt.state,
        reason=clean(receipt.reason or ""),
        provider=clean(receipt.provider or ""),
        trace=clean(receipt.trace or ""),
        at=at,
        attempts=max(0, min(receipt.attempt, ATTEMPTS_MAX)),
    )
    if f"{receipt.state}_at" in _TIMES:
        setattr(fact, f"{receipt.state}_at", at)
    return fact


Range = tuple[str, str, str, int, int, str, str, str, datetime, datetime | None]
"""Tenant, user, epoch, up_to, after, device, channel, state (its key), at, sent_at."""


@dataclass(slots=True)
class DeviceCursor:
    """How far a device has acknowledged, and when.

    `touched_nanoseconds`: when RECEIPTS stored the last acknowledgement, as Unix time.
    """

    epoch: str
    seq: int
    at: datetime
    touched_nanoseconds: int
    anew: bool = False
    """Of another epoch than the one before it: replaces it whatever the sequences say."""

    def merge(self, later: DeviceCursor) -> None:
        """Take in a later receipt: within an epoch a cursor only grows, another epoch replaces it."""
        self.touched_nanoseconds = max(self.touched_nanoseconds, later.touched_nanoseconds)
        if later.epoch != self.epoch:
            self.epoch, self.seq, self.at, self.anew = later.epoch, later.seq, later.at, True
        elif later.seq > self.seq:
            self.seq, self.at = later.seq, later.at


@dataclass(slots=True)
class Receipts:
    """The fold of receipts: deliveries by their key, ranges once each, the newest cursor of each device.

    `devices`: by user, those of the `DEVICES_MAX` devices that acknowledged last, the last one at the end.
    """

    deliveries: dict[Key, Delivery] = field(default_factory=dict)
    ranges: dict[tuple[str | int, ...], Range] = field(default_factory=dict)
    devices: dict[User, dict[str, DeviceCursor]] = field(default_factory=dict)
    skipped: int = 0

    @property
    def cursors(self) -> dict[tuple[str, str, str], DeviceCursor]:
        """The cursors by tenant, user and device."""
        return {(*user, device): one for user, devices in self.devices.items() for device, one in devices.items()}


def fold(batch: Iterable[Delivered], found: Receipts | None = None) -> Receipts:
    """What a run of RECEIPTS says, in its order. Over the whole stream: the projection `deliveries`.

    Args:
        found: what receipts before these said; it goes on there.
    """
    found = Receipts() if found is None else found
    for stored in batch:
        try:
            tenant, user = user_of(stored.subject)
            receipt = decode_receipt(stored.payload)
            if receipt.state in STATES:
                _add(found, tenant, user, receipt, stored)
            else:
                found.skipped += 1
        except (*NO_RECORD, InvalidToken):
            found.skipped += 1
    return found


def _add(found: Receipts, tenant: str, user: str, receipt: Receipt, stored: Delivered) -> None:
    device, channel = clean(receipt.device), clean(receipt.channel)
    if receipt.id is not None:
        key, fact = (tenant, user, clean(receipt.id), channel, device), delivery_of(receipt)
        if key in found.deliveries:
            found.deliveries[key].merge(fact)
        else:
            found.deliveries[key] = fact
        return
    if receipt.epoch is None or not 0 <= receipt.after < receipt.up_to <= SEQ_MAX:
        found.skipped += 1
        return
    epoch, at = clean(receipt.epoch), zoned(receipt.at) or receipt.at
    unique = (tenant, user, epoch, receipt.up_to, receipt.after, device, channel, receipt.state)
    # Told twice, it says nothing new: the first one stays.
    found.ranges.setdefault(unique, (*unique, at, zoned(receipt.sent_at)))
    if receipt.state == "acknowledged":
        cursor = DeviceCursor(epoch, receipt.up_to, at, stored.time_nanoseconds)
        _touch(found.devices.setdefault((tenant, user), {}), device, cursor)


def _touch(devices: dict[str, DeviceCursor], device: str, cursor: DeviceCursor) -> None:
    """Note an acknowledgement of one of a user's devices. When there are too many, the one that was silent for longest goes."""
    known = devices.pop(device, None)
    if known is None:
        known = cursor
    else:
        known.merge(cursor)
    devices[device] = known
    if len(devices) > DEVICES_MAX:
        del devices[next(iter(devices))]
