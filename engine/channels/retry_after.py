"""How long a provider asks to wait."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from engine.channels.verdicts import RETRY_AFTER_SECONDS_MAX


def retry_after(value: str | None, now: datetime) -> float | None:
    """How many seconds a `Retry-After` (RFC 9110, 10.2.3) tells to wait; None: it tells nothing that can be understood.

    Args:
        value: the header: whole seconds, or a date of HTTP.
        now: with a zone; dates are counted from it.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text, re.ASCII):
        return min(float(text), RETRY_AFTER_SECONDS_MAX)
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    seconds = (at.replace(tzinfo=at.tzinfo or UTC) - now).total_seconds()
    return min(max(seconds, 0.0), RETRY_AFTER_SECONDS_MAX)
