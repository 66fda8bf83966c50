"""A projection, described once: what it is folded from, and its tables. Stores, rebuild, verify and retention work from this.

One more projection is one more description, a fold (`projections.folds`), a store, and what `projections.verify` expects of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final

from engine.partition.worker import Source
from projections.folds.deliveries import Delivery
from projections.folds.inbox import Row
from seamark.protocol.subjects import RECEIPTS_STREAM, encode_token, log_stream

IN_STREAM: Final = "the streams still hold what is in it: retention is shorter than their age"
REPEATED: Final = "an id in it came again, and the log still holds the repetition"
_GIVEN_SINCE: Final = "at >= $1 AND at < now() + interval '5 minutes'"
"""Receipts have the clock of a gateway: one that is far ahead must not keep a month for ever."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a projection, as its versions share it.

    Attributes:
        key: the columns that name a row.
        facts: the other columns that the fold gives.
        at: the column with the time by which rows are kept, and copied.
        earliest: SQL: when the first message was stored or given that a row holds. Where the stream no longer has it, the row
            cannot be folded again.
        moves: whether later messages may change a row's `at`.
        by_months: whether rows have a `kept_until`, and leave with its month.
        needed: SQL: which rows can still be folded, or are needed to fold, where the stream begins at $1; and in words why.
        beside: columns that the fold does not give, and SQL for their value in a row that a rebuild has copied.
    """

    name: str
    key: tuple[str, ...]
    facts: tuple[str, ...]
    at: str = "at"
    earliest: str = "at"
    moves: bool = False
    by_months: bool = True
    needed: Mapping[str, str] = field(default_factory=lambda: {_GIVEN_SINCE: IN_STREAM})
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """What the fold gives."""
        return self.key + self.facts


@dataclass(frozen=True, slots=True)
class Projection:
    """A fold of the logs (`kind` "log") or of the receipts ("rcpt"): `kind` is the first token of its subjects."""

    name: str
    kind: str
    tables: tuple[Table, ...] = ()

    def stream(self, p: int) -> str:
        """The stream with what partition `p` is folded from."""
        return log_stream(p) if self.kind == "log" else RECEIPTS_STREAM

    def subject(self, p: int, tenant: str | None = None) -> str:
        """What of the stream partition `p` is folded from, or of it what is of one tenant."""
        return f"{self.kind}.{p}.>" if tenant is None else f"{self.kind}.{p}.{encode_token(tenant)}.>"

    def source(self, p: int) -> Source:
        """How a projector reads it."""
        return Source(self.stream(p), f"{self.name}-{p}", self.subject(p))


_KEY: Final = ("tenant", "user_id", "id")

UNREAD: Final = Projection("unread", "log")
INBOX: Final = Projection(
    "inbox",
    "log",
    (
        Table(
            "inbox",
            _KEY,
            Row.__struct_fields__[len(_KEY) :],
            at="stored_at",
            earliest="stored_at",
            needed={"stored_at >= $1": IN_STREAM, "repeated_at >= $1": REPEATED},
            beside={"carried": "true"},
        ),
    ),
)
DELIVERIES: Final = Projection(
    "deliveries",
    "rcpt",
    (
        Table(
            "deliveries",
            (*_KEY, "channel", "device"),
            tuple(one.name for one in fields(Delivery)),
            earliest="least(at, sent_at, delivered_at, acknowledged_at, seen_at, read_at, plan_at)",
            moves=True,
        ),
        Table(
            "delivery_ranges",
            ("tenant", "user_id", "epoch", "up_to", "after_seq", "device", "channel", "state"),
            ("at", "sent_at"),
        ),
        Table(
            "device_cursors",
            ("tenant", "user_id", "device"),
            ("epoch", "seq", "at"),
            moves=True,
            by_months=False,
            beside={"touched_at": "i.touched_at"},
        ),
    ),
)

IN_TABLES: Final = {one.name: one for one in (INBOX, DELIVERIES)}
"""The projections in PostgreSQL, by name."""
