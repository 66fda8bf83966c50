"""The unread count as a pure fold of one user's log: what the stores are held against.

Records take effect in the order of the log, and only on what stands before them:

- A `notification` for the screen counts until it is read, archived, recalled, superseded or expired. One with the header
  `Seamark-Skip` never counts. One whose id came before changes nothing (`projections.folds.repeats`).
- `read` and `archive` name ids, or everything up to a sequence; `recall` names ids. What they name and is not there (never
  was, not any more, or comes later in the log) they do not touch.
- With a `collapse_key`, a notification takes the place of the one before it with the same key, whether that was read or not;
  recalling it does not bring the former back.
- An expired notification does not count: `count(now)` leaves it out, what is remembered does not depend on the clock.

Memory is bounded: of more than `UNREAD_MAX` notifications that count, the oldest are given up (expired ones first), and from
then on the count says `more`: it is the exact number of the newest, and a lower bound of all. `more` ends

- with a `read` or `archive` up to the last one given up, or beyond it: none of them counts any more;
- when all that were given up have expired.

To read or recall them one by one by their ids does not end it, nor does superseding them: which ids were given up is not
remembered, so it cannot be known how many are left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import msgspec

from engine.partition.worker import Delivered
from projections.folds.changes import NEVER_SHOWN, NO_RECORD, Change, clean, decode_change
from projections.folds.repeats import REMEMBERED_MAX, Remembered, fingerprint

UNREAD_MAX: Final = 1000
"""Unread notifications kept for each user: a badge says "1000+" anyway, and 1 000 ids are some 100 KB."""

FOR_EVER: Final = 1 << 53
"""Expiry, in milliseconds, of what never expires; the largest number that every part of the store represents exactly."""


def milliseconds(at: datetime) -> int:
    """Unix time; a time without zone is one of UTC."""
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)


class Unread(msgspec.Struct, frozen=True):
    """How many notifications are unread. `more`: at least so many, see above.

    `by_category` holds those that have a category; the others are in `count` only.
    """

    count: int
    by_category: dict[str, int]
    more: bool = False


NONE_UNREAD: Final = Unread(0, {})


@dataclass(slots=True)
class _Entry:
    seq: int
    category: str
    collapse_key: str
    expires_ms: int


@dataclass(slots=True)
class UserFold:
    """One user's unread notifications."""

    bound: int = UNREAD_MAX
    remembered: Remembered = field(default_factory=Remembered)
    _entries: dict[str, _Entry] = field(default_factory=dict)  # by id, in the order of the log
    _given_up_to: int = 0
    _given_up_until_ms: int = 0

    def apply(self, record: Delivered) -> None:
        """Apply a record of the user. What is none changes nothing."""
        try:
            change = decode_change(record.payload)
        except NO_RECORD:
            return
        if change.kind == "notification":
            id = clean(change.id)
            if self.remembered.add(fingerprint(id)) and NEVER_SHOWN not in record.headers:
                self._add(record.seq, record.time_nanoseconds // 1_000_000, id, change)
        elif change.kind in ("read", "archive", "recall"):
            for id in change.ids:
                self._entries.pop(clean(id), None)
            if change.up_to is not None and change.kind != "recall":
                self._clear(change.up_to)

    def _add(self, seq: int, stored_ms: int, id: str, change: Change) -> None:
        self._entries.pop(id, None)  # so old that it is new again
        key = clean(change.collapse_key or "")
        for former in [id for id, entry in self._entries.items() if key and entry.collapse_key == key]:
            del self._entries[former]
        expires = milliseconds(change.expires_at) if change.expires_at else FOR_EVER
        self._entries[id] = _Entry(seq, clean(change.category or ""), key, expires)
        if len(self._entries) > self.bound:
            # By the time of the record, not of whoever folds: whenever it is folded, the outcome is the same.
            for expired in [id for id, entry in self._entries.items() if entry.expires_ms <= stored_ms]:
                del self._entries[expired]
        while len(self._entries) > self.bound:
            entry = self._entries.pop(next(iter(self._entries)))
            self._given_up_to = entry.seq
            self._given_up_until_ms = max(self._given_up_until_ms, entry.expires_ms)

    def _clear(self, up_to: int) -> None:
        for id in [id for id, entry in self._entries.items() if entry.seq <= up_to]:
            del self._entries[id]
        if up_to >= self._given_up_to:
            self._given_up_to = self._given_up_until_ms = 0

    def count(self, now_ms: int) -> Unread:
        """What is unread at `now_ms`."""
        by_category: dict[str, int] = {}
        count = 0
        for entry in self._entries.values():
            if entry.expires_ms > now_ms:
                count += 1
                if entry.category:
                    by_category[entry.category] = by_category.get(entry.category, 0) + 1
        return Unread(count, by_category, more=self._given_up_to > 0 and self._given_up_until_ms > now_ms)


def fold(
    log: Iterable[Delivered], now_ms: int, *, bound: int = UNREAD_MAX, remembered: int = REMEMBERED_MAX
) -> dict[str, Unread]:
    """What is unread after `log`, by user (`<tenant>.<user>`, as tokens); users with nothing unread are left out."""
    users: dict[str, UserFold] = {}
    for record in log:
        user = record.subject.decode().split(".", 2)[2]
        if user not in users:
            users[user] = UserFold(bound, Remembered(bound=remembered))
        users[user].apply(record)
    counts = {user: state.count(now_ms) for user, state in users.items()}
    return {user: unread for user, unread in counts.items() if unread != NONE_UNREAD}
