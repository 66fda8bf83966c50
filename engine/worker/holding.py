"""When a job is handed out again that is not sent now."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from engine.channels.channel import Job, Outcome
from engine.jobs.desk import Hold, Over
from engine.jobs.retry import CONFIG_PAUSE_SECONDS, POLICIES, put_back_seconds

_log = structlog.get_logger("seamark.worker")

HELD_SECONDS: Final = 5.0
"""How long a job that a control holds is put back for, and longer each time (`put_back_seconds`): what was held for long goes
within a minute and a half once the control is restored. The million jobs of a tenant would else be written anew all the time."""


def hold(seconds: float, why: str) -> Hold:
    """For so long, and up to as long again."""
    return Hold(datetime.now(UTC) + timedelta(seconds=seconds * random.uniform(1.0, 2.0)), why)


def held(job: Job, why: str) -> Hold:
    """What a control holds."""
    return Hold(datetime.now(UTC) + timedelta(seconds=longer(job, HELD_SECONDS)), why)


def longer(job: Job, seconds: float) -> float:
    """For so long the first time, and longer each time."""
    return put_back_seconds(job.put_backs, seconds, random.random())


def ours(job: Job, outcome: Outcome) -> Hold | Over:
    """A fault of our configuration: the job waits for it to be mended, as long as the channel tries anything again."""
    waited = (datetime.now(UTC) - job.first_at).total_seconds()
    if waited > POLICIES[job.channel].horizon_seconds:
        return Over("failed", outcome.code, outcome)
    _log.error("job_waits_for_configuration", channel=job.channel, code=outcome.code)
    return hold(CONFIG_PAUSE_SECONDS, outcome.code)
