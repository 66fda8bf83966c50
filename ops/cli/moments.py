"""Moments as people type them into commands."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from engine.errors import InvalidSetting

_AGO: Final = re.compile(r"([1-9][0-9]{0,5})(m|h|d)", re.ASCII)
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


def time_of(option: str, text: str) -> datetime:
    """The moment that an option says.

    Raises:
        InvalidSetting: it says none.
    """
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        at = datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return at
    except ValueError:
        pass
    raise InvalidSetting(
        f"{option}: {text!r} is no time: write 90m, 2h or 3d ago, or 2026-01-31T12:00:00Z with an offset"
    )
