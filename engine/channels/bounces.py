"""When an address gets nothing more: a failure that proves nobody is there, too many that do not, a complaint, a wish. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from engine.channels.channel import Outcome
from engine.directory.contacts import Addressed
from engine.directory.suppressions import NewSuppression
from engine.plan.profile import COMPLAINT, OPTED_OUT, SCOPE_ALL

SOFT_BOUNCES_MAX: Final = 5
SOFT_WINDOW: Final = timedelta(days=14)
SOFT_SUPPRESSED: Final = timedelta(days=7)
"""So many messages in so many days that an address did not take, and it gets nothing for so long: mailboxes are emptied,
servers mended."""

SOFT_DAYS_MIN: Final = 2
"""On so many different days: a server that refuses everybody for an afternoon says nothing about one of its users."""

HARD_BOUNCE: Final = "hard_bounce"
SOFT_BOUNCES: Final = "soft_bounces"
INVALID_NUMBER: Final = "invalid_number"

COMPLAINED: Final = "complaint"
"""The code of an outcome `opted_out` that came of a complaint; any other is a wish."""


def may_suppress(outcome: Outcome) -> bool:
    """Whether an outcome can lead to a suppression."""
    return outcome.kind in ("target_invalid", "opted_out") or outcome.soft_bounce


def suppression_of(
    outcome: Outcome,
    channel: Addressed,
    address: str,
    *,
    category: str,
    soft_bounces: Sequence[datetime],
    now: datetime,
) -> NewSuppression | None:
    """The suppression that follows from an outcome; None: none.

    Args:
        outcome: of an attempt, or of what a provider has reported later.
        address: whose.
        category: of the notification; a wish to get no more mails holds for it. "": for all. STOP holds for all texts:
            providers send none of any kind after it.
        soft_bounces: when earlier messages to this address bounced softly, one time for each message.
        now: when this outcome came, with an offset.

    Raises:
        ValueError: `address` is none.
    """
    if outcome.kind == "target_invalid":
        seconds = outcome.suppress_seconds
        ends = None if seconds is None else now + timedelta(seconds=seconds)
        reason = HARD_BOUNCE if channel == "email" else INVALID_NUMBER
        return _suppression(channel, address, reason, outcome, expires_at=ends)
    if outcome.kind == "opted_out":
        if outcome.code == COMPLAINED:
            return _suppression(channel, address, COMPLAINT, outcome)
        scope = (category or SCOPE_ALL) if channel == "email" else SCOPE_ALL
        return _suppression(channel, address, OPTED_OUT, outcome, scope=scope)
    if outcome.soft_bounce and are_too_many([*soft_bounces, now], now):
        return _suppression(channel, address, SOFT_BOUNCES, outcome, expires_at=now + SOFT_SUPPRESSED)
    return None


def are_too_many(soft_bounces: Sequence[datetime], now: datetime) -> bool:
    """Whether an address has bounced softly too often, this time included."""
    recent = [at for at in soft_bounces if timedelta(0) <= now - at <= SOFT_WINDOW]
    return len(recent) >= SOFT_BOUNCES_MAX and len({at.astimezone(UTC).date() for at in recent}) >= SOFT_DAYS_MIN


def _suppression(
    channel: Addressed,
    address: str,
    reason: str,
    outcome: Outcome,
    *,
    scope: str = SCOPE_ALL,
    expires_at: datetime | None = None,
) -> NewSuppression:
    source = f"{outcome.provider or channel} {outcome.code}".strip()[:128]
    return NewSuppression(
        channel=channel, address=address, reason=reason, scope=scope, source=source, expires_at=expires_at
    )
