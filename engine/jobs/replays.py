"""A job that has ended is brought to life again: from its dead letter, or because an endpoint asks for what it has missed."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from msgspec.structs import replace

from engine.channels.channel import Job

TRIES_SPARE: Final = 1
"""Numbers of tries that are left out between two lives. A worker of the former one that was thought dead may still report that
its try was taken; its receipt has the number after the last (`claims.replaces`)."""


def replayed(job: Job, tries: int, now: datetime) -> Job:
    """The job in its next life: never tried, with a claim of its own, and with receipts that win over all that were before.

    Made twice from the same facts it is the same life, whose claim lets it be sent once. Its message may have a twin, which it
    says (`again`), so that a claim which Redis has lost is not taken for one that never was.

    Args:
        tries: the highest number that any receipt of it has.
    """
    return replace(
        job,
        stage="retry",
        attempt=0,
        tries_before=tries + TRIES_SPARE,
        again=True,
        put_backs=0,
        first_at=now,
        untried_at=None,
        tried_at=None,
    )
