"""What has become of a notification by the time that wakes its job: has anybody seen it, is it read, recalled, superseded?"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, cast

import structlog

from engine.channels.channel import Job
from engine.errors import BrokerError, StoreUnavailable
from engine.jobs.desk import Clock, Hold
from engine.patience import passes
from engine.plan.decisions import ESCALATION, Facts, Stage
from engine.worker.caughtup import PUT_BACK_SECONDS, CaughtUp, Known, Tables

_log = structlog.get_logger("seamark.worker")

WOKEN: Final = (ESCALATION, "quiet_hours", "send_window", "cap", "retry")
"""Stages of jobs that have waited while somebody could read the notification."""

WAIT_SECONDS: Final = 10.0
"""How long an escalation waits for the tables. Then it is sent by what they know: too often rather than not at all."""


class Noticed:
    """Facts for jobs that have waited. An escalation waits until the tables know all that was stored before it fired.

    Other jobs take what the tables say: a retry or the end of quiet hours is sent in any case unless they say otherwise.
    """

    def __init__(self, caught_up: CaughtUp, tables: Tables, clock: Clock) -> None:
        self._caught_up = caught_up
        self._tables = tables
        self._clock = clock

    async def facts(self, job: Job) -> Facts | Hold:
        """What a decision about the job is made from; or when to ask again.

        Where nobody can tell, nothing has happened: whoever is away must not keep a notification from anybody.
        """
        if job.stage == ESCALATION and not await self._is_known(job):
            now = self._clock.now()
            if now < job.first_at + timedelta(seconds=WAIT_SECONDS):
                return Hold(now + timedelta(seconds=PUT_BACK_SECONDS), "tables_behind")
            _log.warning("escalated_unknowing", channel=job.channel)
        return facts_of(job, await self._known(job))

    async def _is_known(self, job: Job) -> bool:
        try:
            return await self._caught_up.knows_all_of(job.tenant, job.user)
        except (BrokerError, StoreUnavailable) as error:
            if not passes(error):
                _log.exception("escalation_not_looked_up", channel=job.channel)
            return False

    async def _known(self, job: Job) -> Known | None:
        try:
            found = await self._tables.known(job.tenant, job.user, [job.id])
        except StoreUnavailable as error:
            if not passes(error):
                _log.exception("notification_not_looked_up", channel=job.channel)
            return None
        return found[0] if found else None


def facts_of(job: Job, known: Known | None) -> Facts:
    """The facts of a decision. None: the tables know nothing of the notification."""
    stage = cast("Stage", job.stage)
    if known is None:
        return Facts(stored_at=job.stored_at or job.first_at, stage=stage)
    return Facts(
        stored_at=known.stored_at,
        stage=stage,
        seen=known.seen,
        read=known.read,
        archived=known.archived,
        recalled=known.recalled,
        superseded=known.superseded,
    )
