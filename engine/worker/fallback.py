"""What becomes of a push when nobody is left to push to: what was to follow if nobody saw it follows at once.

The escalation is scheduled already, as a job of its own. The same job is made again, due now: its claim is the same one, so
whichever message comes second finds that there is nothing left to do.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import dropwhile

import structlog
from msgspec.structs import replace

from engine.channels.channel import Job
from engine.jobs.claims import CLAIM_HORIZON_SECONDS
from engine.jobs.desk import Queue
from engine.plan.decisions import ESCALATION
from engine.plan.rules import TypeRule
from engine.worker.contexts import Rules

_log = structlog.get_logger("seamark.worker")


class Fallback:
    """Wakes escalations.

    Args:
        queue: where jobs are written.
    """

    def __init__(self, rules: Rules, queue: Queue) -> None:
        self._rules, self._queue = rules, queue

    async def wake(self, job: Job) -> None:
        """Have the next channel of the rule that waits for `job` not to be seen sent now. Done twice it is harmless.

        Raises:
            StoreUnavailable, BrokerError: it is not known, or not written.
        """
        rule = (await self._rules.of(job.tenant)).rule_of(job.type)
        following = None if rule is None else next_channel(rule, job)
        if following is not None:
            await self._queue.add([following])
            _log.info("escalated_at_once", channel=following.channel, instead_of=job.channel)


def next_channel(rule: TypeRule, job: Job) -> Job | None:
    """The job of the next channel of the rule that is an escalation and not due yet; None: there is none.

    Nor is there one where the event has named its channels, of which a job knows its own only: the others come in time, if they
    were named. A digest has members that were planned for its own channel. And what is due later than claims are kept comes in
    its own time.
    """
    if job.requested or job.digest:
        return None
    names = list(rule.channels)
    behind = list(dropwhile(lambda name: name != job.channel, names))[1:]
    for name in behind:
        seconds = rule.channels[name].unless_seen_seconds
        if seconds is not None:
            now = datetime.now(UTC)
            due = (job.stored_at or job.first_at) + timedelta(seconds=seconds)
            if now >= due:
                return None  # it has been handed out by itself, and its claim may be gone by now
            if (due - now).total_seconds() > CLAIM_HORIZON_SECONDS:
                return (
                    None  # when its own message comes, the claim of this one would be gone, and it would be sent twice
                )
            # A push that was replayed has had lives that the escalation has not: with their claim it would be sent once more.
            anew = {
                "attempt": 0,
                "tries_before": 0,
                "first_at": now,
                "untried_at": None,
                "tried_at": None,
                "again": True,
            }
            return replace(job, channel=name, target="", stage=ESCALATION, **anew)
    return None
