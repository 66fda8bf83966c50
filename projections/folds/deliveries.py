"""What is known of one delivery, whatever the order in which its facts arrive.

One delivery is a (notification, user, channel, device). Facts are merged by rank: the higher one says the state, so merging
is commutative, associative and idempotent, and a receipt that comes late, twice or first changes nothing else.

- Proof of arrival wins over everything: delivered < acknowledged < seen < read.
- What was planned is below all of these. The plan of the highest term counts, and it counts whole: a planner that was
  overtaken may have stored another one, but what came of it was refused.
- Below proof of arrival the later attempt wins over the earlier one, and within one attempt
  queued < ambiguous < suppressed < cancelled < expired < sent < failed < split: what was sent is no longer cancelled, and what a
  provider took may still come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, NamedTuple

from engine.partition.reader import Delivered
from projections.folds.changes import NO_RECORD, clean
from projections.folds.inbox import SEQ_MAX, User, user_of, zoned
from seamark.protocol.errors import InvalidToken
from seamark.protocol.receipts import PLANNED, Receipt, decode_receipt

_BELOW: Final = ("queued", "ambiguous", "suppressed", "cancelled", "expired", "sent", "failed", "split")
ARRIVED: Final = ("delivered", "acknowledged", "seen", "read")
STATES: Final = (*_BELOW, *ARRIVED)
ATTEMPTS_MAX: Final = 1_000_000

DEVICES_MAX: Final = 50
"""How many devices of a user have a remembered cursor: those that acknowledged last. A client chooses its device's name, and no
person has more devices than twice the sessions that a user may have open."""

_ARRIVAL: Final = (ATTEMPTS_MAX + 1) * 10
PLAN_RANK: Final = -1
"""Of a row of which nothing is known but its plan."""
TERM_MAX: Final = (1 << 63) - 1

_ENDED: Final = {"expired": "expired", "cancelled": "cancelled", "recalled": "cancelled"}
"""States of what is never sent, by the reason; for all other reasons it is suppressed."""


def rank(state: str, attempt: int = 0) -> int:
    """Where a fact stands among those of one delivery: the highest is its state.

    Raises:
        ValueError: no such state.
    """
    if state in ARRIVED:
        return _ARRIVAL + ARRIVED.index(state)
    return max(0, min(attempt, ATTEMPTS_MAX)) * 10 + _BELOW.index(state)


def try_of(rank: int) -> int:
    """The number of the try that a rank below proof of arrival is about."""
    return rank // 10


Key = tuple[str, str, str, str, str]
"""Tenant, user, id, channel, device."""

Notification = tuple[str, str, str]
"""Tenant, user, id."""


@dataclass(slots=True)
class Delivery:
    """Everything known of one delivery. Fields are columns of the table `deliveries`.

    `provider_ids`: what providers call the message, see `named`; `segments`: of an SMS, the most that one try has cost. The last
    four say what was planned: `plan_term` 0: nothing.
    """

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
    provider_ids: str = ""
    segments: int = 0
    plan_term: int = 0
    plan_when: str = ""
    plan_why: str = ""
    plan_at: datetime | None = None

    def merge(self, other: Delivery) -> None:
        """Take in what `other` knows. Of two facts with one rank the earlier says when and why."""
        for name in _TIMES:
            times = [at for at in (getattr(self, name), getattr(other, name)) if at is not None]
            setattr(self, name, min(times, default=None))
        self.attempts = max(self.attempts, other.attempts)
        self.segments = max(self.segments, other.segments)
        self.provider_ids = _joined(self.provider_ids, other.provider_ids)
        if _order(other) > _order(self):
            self.rank, self.state, self.at = other.rank, other.state, other.at
            self.reason, self.provider, self.trace = other.reason, other.provider, other.trace


PROVIDER_IDS_MAX: Final = 8
"""Names of a message that are kept: more tries than that are taken by a provider only where each is in doubt."""

SEGMENTS_MAX: Final = (1 << 31) - 1


def named(attempt: int, provider: str, provider_id: str) -> str:
    """The name that a provider has given to a message, with the number of its try: one line of `provider_ids`."""
    return "\t".join(" ".join(clean(str(word)).split()) for word in (attempt, provider, provider_id))


def names_in(provider_ids: str) -> list[tuple[str, str, str]]:
    """The number of the try, the provider and the name, of each line."""
    lines = [tuple(line.split("\t")) for line in provider_ids.split("\n")]
    return [(line[0], line[1], line[2]) for line in lines if len(line) == 3]


def _joined(one: str, other: str) -> str:
    """The lines of both, each once, in their order. Of too many the last ones go, in whatever order they came."""
    if not other or one == other:
        return one
    if not one:
        return other
    return "\n".join(sorted({*one.split("\n"), *other.split("\n")})[:PROVIDER_IDS_MAX])


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
        provider_ids=named(receipt.attempt, receipt.provider or "", receipt.provider_id) if receipt.provider_id else "",
        segments=max(0, min(receipt.segments, SEGMENTS_MAX)),
    )
    if f"{receipt.state}_at" in _TIMES:
        setattr(fact, f"{receipt.state}_at", at)
    return fact


class Plan(NamedTuple):
    """What was planned of a notification: by channel when, and why."""

    term: int
    at: datetime
    trace: str
    channels: dict[str, tuple[str, str]]

    def wins(self, other: Plan | None) -> bool:
        """Whether this one counts: the higher term; of two with the same (an id that came again) the earlier."""
        return other is None or self.order() > other.order()

    def order(self) -> tuple[int, float, list[tuple[str, tuple[str, str]]]]:
        """Of two plans of a notification the one that comes last in this order counts."""
        return (self.term, -(self.at - _UNIX).total_seconds(), sorted(self.channels.items()))

    def on(self, channel: str, known: Delivery | None = None) -> Delivery:
        """A channel's row: what is `known` of it, if anything, and its plan."""
        when, why = self.channels[channel]
        if known is None or known.rank <= PLAN_RANK:
            state = _ENDED.get(why, "suppressed") if when == "never" else PLANNED
            known = Delivery(PLAN_RANK, state, why, "", self.trace, self.at, 0)
        return replace(known, plan_term=self.term, plan_when=when, plan_why=why, plan_at=self.at)


def plan_in(rows: Mapping[str, Delivery]) -> Plan | None:
    """The plan that stands in the rows of a notification, by channel; None: nothing was planned of it."""
    planned = {channel: row for channel, row in rows.items() if row.plan_term}
    channels = {channel: (row.plan_when, row.plan_why) for channel, row in planned.items()}
    for row in planned.values():
        return Plan(row.plan_term, row.plan_at or row.at, row.trace, channels)
    return None


def replanned(rows: Mapping[str, Delivery], plan: Plan) -> dict[str, Delivery | None]:
    """What a plan changes in the rows of its notification, by channel; None: the row goes."""
    former = plan_in(rows)
    if not plan.wins(former):
        return {}
    changed: dict[str, Delivery | None] = {channel: plan.on(channel, rows.get(channel)) for channel in plan.channels}
    for channel in (former.channels if former is not None else {}).keys() - changed.keys():
        row = rows[channel]
        unplanned = replace(row, plan_term=0, plan_when="", plan_why="", plan_at=None)
        changed[channel] = None if row.rank <= PLAN_RANK else unplanned
    return changed


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

    def move(self, epoch: str, seq: int, at: datetime, touched_nanoseconds: int) -> None:
        """Take in a later receipt: within an epoch a cursor only grows, another epoch replaces it."""
        self.touched_nanoseconds = max(self.touched_nanoseconds, touched_nanoseconds)
        if epoch != self.epoch:
            self.epoch, self.seq, self.at, self.anew = epoch, seq, at, True
        elif seq > self.seq:
            self.seq, self.at = seq, at


@dataclass(slots=True)
class Receipts:
    """The fold of receipts: deliveries by their key, plans by notification, ranges once each, the newest cursor of each device.

    `devices`: by user, those of the `DEVICES_MAX` devices that acknowledged last, the last one at the end.
    """

    deliveries: dict[Key, Delivery] = field(default_factory=dict)
    plans: dict[Notification, Plan] = field(default_factory=dict)
    ranges: dict[tuple[str | int, ...], Range] = field(default_factory=dict)
    devices: dict[User, dict[str, DeviceCursor]] = field(default_factory=dict)
    skipped: int = 0

    @property
    def cursors(self) -> dict[tuple[str, str, str], DeviceCursor]:
        """The cursors by tenant, user and device."""
        return {(*user, device): one for user, devices in self.devices.items() for device, one in devices.items()}

    def rows(self) -> dict[Key, Delivery]:
        """What the table `deliveries` holds: the deliveries that channels tell of, and a row for each channel of a plan."""
        found = dict(self.deliveries)
        for notification, plan in self.plans.items():
            for channel in plan.channels:
                key = (*notification, channel, "")
                found[key] = plan.on(channel, found.get(key))
        return found


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
            elif receipt.state == PLANNED and (plan := _plan_of(receipt)) is not None:
                notification = (tenant, user, clean(receipt.id or ""))
                if plan.wins(found.plans.get(notification)):
                    found.plans[notification] = plan
            else:
                found.skipped += 1
        except (*NO_RECORD, InvalidToken):
            found.skipped += 1
    return found


def _plan_of(receipt: Receipt) -> Plan | None:
    """None: this is no plan of anything."""
    if receipt.id is None or not receipt.plan or not 0 < receipt.term <= TERM_MAX:
        return None
    channels = {clean(channel): (clean(one.when), clean(one.why)) for channel, one in receipt.plan.items()}
    return Plan(receipt.term, zoned(receipt.at) or receipt.at, clean(receipt.trace or ""), channels)


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
        devices = found.devices.get((tenant, user))
        if devices is None:
            devices = found.devices[tenant, user] = {}
        _touch(devices, device, epoch, receipt.up_to, at, stored.time_nanoseconds)


def _touch(
    devices: dict[str, DeviceCursor], device: str, epoch: str, seq: int, at: datetime, touched_nanoseconds: int
) -> None:
    """Note an acknowledgement of one of a user's devices. When there are too many, the one that was silent for longest goes."""
    known = devices.pop(device, None)
    if known is not None:
        known.move(epoch, seq, at, touched_nanoseconds)
        devices[device] = known
        return
    devices[device] = DeviceCursor(epoch, seq, at, touched_nanoseconds)
    if len(devices) > DEVICES_MAX:
        del devices[next(iter(devices))]
