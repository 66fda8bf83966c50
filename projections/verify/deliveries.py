"""What is known of a user's deliveries by the receipts: what `projections.verify.tables` holds its rows against."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import msgspec

from engine.partition.reader import Delivered
from projections.folds.deliveries import fold
from projections.folds.inbox import User
from projections.projection import DELIVERIES
from projections.verify.streams import Key, Part, Row

GATEWAY_CLOCK_SLACK: Final = timedelta(minutes=5)
"""Receipts carry the time of a gateway's clock, which may differ this much from the broker's clock. A row that is hardly younger
than the oldest receipt may have lost its first one."""


def light(stored: Delivered) -> Delivered | None:
    """A receipt without its headers."""
    return msgspec.structs.replace(stored, headers=b"")


def is_older(row: Row, part: Part) -> bool:
    """Whether a receipt that the row was folded from may have left the stream."""
    return part.horizon is not None and row.earliest - GATEWAY_CLOCK_SLACK < part.horizon


def expected(user: User, part: Part, said: Sequence[Delivered], older: Sequence[Row]) -> dict[Key, dict[str, Any]]:
    """The rows of a user but the `older` ones: of those the receipts that are left tell only a part."""
    folded = fold(said)
    deliveries, ranges, cursors = DELIVERIES.tables
    rows: dict[Key, dict[str, Any]] = {
        (deliveries.name, *key): {name: getattr(one, name) for name in deliveries.facts}
        for key, one in folded.rows().items()
    }
    rows |= {(ranges.name, *one[:8]): dict(zip(ranges.facts, one[8:], strict=True)) for one in folded.ranges.values()}
    rows |= {
        (cursors.name, *key): {name: getattr(one, name) for name in cursors.facts}
        for key, one in folded.cursors.items()
    }
    for row in older:
        rows.pop(row.place, None)
    return rows
