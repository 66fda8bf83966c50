"""The inbox as a pure fold of logs: what the tables in PostgreSQL are held against, and how a batch is folded on its way there.

Records take effect in the order of the log, and only on what stands before them:

- A `notification` is a row. One whose id came before changes nothing but `repeated_at`, or, if that was long ago, takes the place
  of the row (`projections.folds.repeats`). One with the header `Seamark-Skip` is a row that is not shown: its way on other
  channels is told by it.
- `read` and `archive` name ids, or everything up to a sequence; `recall` names ids. The first record that says so counts.
- With a `collapse_key`, a notification that is shown supersedes all rows before it with the same key.
- Expiry is no change: whoever reads the inbox leaves out what has expired by then.

All other changes only ever add a mark to a row, so rows that the log no longer holds can be carried over by a rebuild.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from engine.partition.reader import Delivered
from projections import metrics
from projections.folds.changes import NEVER_SHOWN, NO_RECORD, Change, clean, decode_change
from projections.folds.repeats import REMEMBERED_MAX, Remembered
from seamark.protocol.errors import InvalidToken
from seamark.protocol.events import Label
from seamark.protocol.records import EventPosition
from seamark.protocol.subjects import decode_token

SEQ_MAX: Final = (1 << 63) - 1

SUBJECTS_KNOWN_MAX: Final = 16_384
"""Subjects whose user is not worked out again: a batch names each of them several times. At most some 6 MB."""


class Entry(Change, gc=False, omit_defaults=True):
    """What of a record concerns the inbox; its bytes are kept whole beside it."""

    at: datetime | None = None
    type: str | None = None
    event: EventPosition | None = None
    plan: dict[str, Any] = msgspec.field(default_factory=dict)
    device: str | None = None
    transaction_id: Label | None = None


_decode_whole = msgspec.json.Decoder(Entry).decode


def decode_entry(payload: bytes) -> Entry:
    """What `payload` says. Where only what the inbox alone reads is not as it should be, that is left out: it counts elsewhere.

    Raises:
        MsgspecError, UnicodeDecodeError, RecursionError: it is no record.
    """
    try:
        return _decode_whole(payload)
    except NO_RECORD:
        change = decode_change(payload)
        return Entry(**{name: getattr(change, name) for name in Change.__struct_fields__})


User = tuple[str, str]
"""Tenant and user, as text."""


class Row(msgspec.Struct, gc=False):
    """A notification of a user and what later records made of it. Fields are the columns of the table `inbox`, in their order."""

    tenant: str
    user_id: str
    id: str
    era: int
    seq: int
    epoch: str
    stored_at: datetime
    type: str | None
    category: str | None
    collapse_key: str | None
    expires_at: datetime | None
    channels: list[str]
    shown: bool
    event_epoch: str | None
    event_seq: int | None
    record: bytes
    read_seq: int | None = None
    read_at: datetime | None = None
    read_device: str | None = None
    archived_seq: int | None = None
    archived_at: datetime | None = None
    recalled_seq: int | None = None
    recalled_at: datetime | None = None
    superseded_seq: int | None = None
    repeated_at: datetime | None = None
    transaction_id: str | None = None
    withheld: str | None = None


@dataclass(slots=True)
class Mark:
    """What a `read`, `archive` or `recall` says of rows by their ids (`ids`) or of all in (`above`, `up_to`]."""

    seq: int
    at: datetime
    device: str | None
    ids: list[str] = field(default_factory=list)
    above: int = 0
    up_to: int | None = None


class UserChanges(msgspec.Struct):
    """What a run of records makes of one user's inbox: new rows, and marks for rows that stood before.

    `known`: ids that stood before, each with how many rows are newer. `replaced`: those whose row goes, for a new one with that
    id is here. `repeated`: those that came again and changed nothing, and when. `superseding`: the first new row of each collapse
    key.
    """

    known: Mapping[str, int]
    remembered: Remembered
    replaced: set[str] = msgspec.field(default_factory=set)
    repeated: dict[str, datetime] = msgspec.field(default_factory=dict)
    rows: dict[str, Row] = msgspec.field(default_factory=dict)
    read: list[Mark] = msgspec.field(default_factory=list)
    archive: list[Mark] = msgspec.field(default_factory=list)
    recall: list[Mark] = msgspec.field(default_factory=list)
    superseding: dict[str, int] = msgspec.field(default_factory=dict)

    def add(self, row: Row) -> None:
        """A notification."""
        if not self.remembered.add(row.id):
            if row.id in self.rows:
                self.rows[row.id].repeated_at = row.stored_at
            else:
                self.repeated[row.id] = row.stored_at
            return
        if row.id in self.known:
            self.replaced.add(row.id)
        self.rows.pop(row.id, None)
        key = row.collapse_key
        if key is not None and row.shown:
            self.superseding.setdefault(key, row.seq)
            for other in self.rows.values():
                if other.collapse_key == key and other.superseded_seq is None:
                    other.superseded_seq = row.seq
        self.rows[row.id] = row

    def mark(self, kind: str, mark: Mark) -> None:
        """A `read`, `archive` or `recall`."""
        rows = [self.rows[id] for id in mark.ids if id in self.rows]
        if mark.up_to is not None:
            rows += [row for row in self.rows.values() if row.seq <= mark.up_to]
        for row in rows:
            _mark(row, kind, mark)
        marks: list[Mark] = getattr(self, kind)
        # Rows that stood before: what an earlier mark of this run covers, it has covered first.
        reached = max((one.up_to for one in marks if one.up_to is not None), default=0)
        if mark.up_to is not None and mark.up_to > reached:
            mark.above = reached
        else:
            mark.up_to = None
        if mark.ids or mark.up_to is not None:
            marks.append(mark)


def _mark(row: Row, kind: str, mark: Mark) -> None:
    if kind == "read" and row.read_seq is None:
        row.read_seq, row.read_at, row.read_device = mark.seq, mark.at, mark.device
    elif kind == "archive" and row.archived_seq is None:
        row.archived_seq, row.archived_at = mark.seq, mark.at
    elif kind == "recall" and row.recalled_seq is None:
        row.recalled_seq, row.recalled_at = mark.seq, mark.at


def decoded(batch: Iterable[Delivered]) -> list[tuple[User, Delivered, Entry]]:
    """The records of a batch; what is none is passed over and counted."""
    found = []
    for record in batch:
        try:
            found.append((user_of(record.subject), record, decode_entry(record.payload)))
        except (*NO_RECORD, InvalidToken):
            metrics.projection_skipped.labels("inbox").inc()
    return found


@functools.lru_cache(maxsize=SUBJECTS_KNOWN_MAX)
def user_of(subject: bytes) -> User:
    """Whose log (or receipts) `log.<p>.<tenant>.<user>` is.

    Raises:
        UnicodeDecodeError, InvalidToken: the broker takes any bytes for a token; PostgreSQL knows no NUL, which a name may hold.
    """
    _, _, tenant, user = subject.decode().split(".", 3)
    if "=00" in tenant or "=00" in user:
        raise InvalidToken("a name with a NUL cannot be stored")
    return decode_token(tenant), decode_token(user)


def fold(
    entries: Iterable[tuple[User, Delivered, Entry]],
    epoch: str,
    era: int = 1,
    known: Mapping[User, Mapping[str, int]] | None = None,
    users: dict[User, UserChanges] | None = None,
    remembered: int = REMEMBERED_MAX,
) -> dict[User, UserChanges]:
    """What records make of inboxes in which the ids `known` stand already.

    Over a whole log, and with nothing known, `rows` are the inbox. `users`: what records before these gave; it goes on there.
    """
    users = {} if users is None else users
    for user, stored, entry in entries:
        changes = users.get(user)
        if changes is None:
            stand = known.get(user, {}) if known else {}
            changes = users[user] = UserChanges(stand, Remembered(stand, remembered))
        if entry.kind == "notification":
            changes.add(_row(user, stored, entry, epoch, era))
        elif entry.kind in ("read", "archive", "recall"):
            changes.mark(entry.kind, _as_mark(stored, entry))
    return users


def _row(user: User, stored: Delivered, entry: Entry, epoch: str, era: int) -> Row:
    event, plan = entry.event, entry.plan
    withheld = withheld_by(plan)
    return Row(
        tenant=user[0],
        user_id=user[1],
        id=clean(entry.id),
        era=era,
        seq=stored.seq,
        epoch=epoch,
        stored_at=moment(stored.time_nanoseconds),
        type=clean(entry.type) if entry.type is not None else None,
        category=clean(entry.category) if entry.category is not None else None,
        collapse_key=clean(entry.collapse_key) or None if entry.collapse_key else None,
        expires_at=zoned(entry.expires_at),
        channels=[] if withheld else [clean(channel) for channel in plan],
        shown=NEVER_SHOWN not in stored.headers,
        event_epoch=clean(event.epoch) if event is not None else None,
        event_seq=_bounded(event.seq) if event is not None else None,
        record=stored.payload,
        transaction_id=clean(entry.transaction_id) if entry.transaction_id is not None else None,
        withheld=withheld,
    )


def withheld_by(plan: dict[str, Any]) -> str | None:
    """Why a dispatcher has had the record stored, but shown to nobody; None: it has not."""
    for one in plan.values():
        if not isinstance(one, dict) or one.get("when") != "never":
            return None
    why = next(iter(plan.values())).get("why") if plan else None
    return clean(why) if isinstance(why, str) else None


def _bounded(seq: int) -> int:
    return seq if 0 <= seq <= SEQ_MAX else max(0, min(seq, SEQ_MAX))


def _as_mark(stored: Delivered, entry: Entry) -> Mark:
    up_to = entry.up_to if entry.kind != "recall" else None
    return Mark(
        seq=stored.seq,
        at=zoned(entry.at) or moment(stored.time_nanoseconds),
        device=clean(entry.device) if entry.device is not None else None,
        ids=list(dict.fromkeys(map(clean, entry.ids))),
        up_to=min(up_to, SEQ_MAX) if up_to is not None else None,
    )


_UNIX: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)
"""Days that every zone knows; asyncpg takes `datetime.min` and `datetime.max` for infinity."""


def zoned(at: datetime | None) -> datetime | None:
    """A time as UTC, in which one without zone is; within what both Python and PostgreSQL can say."""
    if at is None:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return at if at.tzinfo is UTC and _FIRST < at < _LAST else max(_FIRST, min(_LAST, at)).astimezone(UTC)


def moment(nanoseconds: int) -> datetime:
    """When a stream stored a message, to the microsecond: what a database keeps."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return _UNIX + timedelta(0, seconds, rest // 1_000)
