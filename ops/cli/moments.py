"""Moments as people type them into commands."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from engine.errors import InvalidSetting
from seamark.protocol.moments import check_moment

_AGO: Final = re.compile(r"([1-9][0-9]{0,5})(m|h|d)", re.ASCII)
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


def time_of(option: str, text: str) -> datetime:
    """The moment that an option says.

    Raises:
        InvalidSetting: it says none.
    """
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None:
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        at = datetime.fromisoformat(text)
        check_moment(option, at)
    except (ValueError, OverflowError) as error:
        raise InvalidSetting(
            f"{option}: {text!r} is no time: write 90m, 2h or 3d ago, or 2026-01-31T12:00:00Z with an offset"
        ) from error
    return at
