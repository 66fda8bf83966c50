"""Moments that come from outside: which of them everybody can compare, convert and store."""

from __future__ import annotations

from datetime import UTC, datetime


def check_moment(name: str, moment: datetime | None) -> None:
    """Pass a moment with an offset that lies in the years 1 to 9999, in UTC: Python has no others. None passes, too.

    Args:
        name: of the member that says it.

    Raises:
        ValueError: with the name and the remedy.
    """
    if moment is None:
        return
    try:
        if moment.tzinfo is not None and moment.astimezone(UTC) is not None:
            return
    except OverflowError:
        pass
    raise ValueError(f"`{name}` must carry an offset and lie in the years 1 to 9999, such as 2026-01-31T12:00:00Z")
