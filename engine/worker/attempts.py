"""A try: its deadline, and what is told of it beside its receipt: figures, lines in the log for somebody to look at, a span."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import structlog

from engine import metrics
from engine.channels.alarms import point_out
from engine.channels.channel import Job, Outcome
from engine.traces import names
from engine.traces.contexts import followed
from engine.traces.spans import Spans, failed
from seamark.protocol.subjects import encode_token

_log = structlog.get_logger("seamark.worker")

OVERTIME_SECONDS: Final = 2.0
"""How long after its deadline a send is still waited for: one that ends by itself says more than that it was given up."""

SPANS_MAX: Final = 50
"""Spans of one try: a digest may have thousands of members, and where everything is followed they would crowd out the rest."""

# Finding the labels of a metric takes longer than counting.
_attempts_of = functools.cache(metrics.worker_attempts.labels)
_send_seconds_of = functools.cache(metrics.worker_send_seconds.labels)
_delay_seconds_of = functools.cache(metrics.worker_delay_seconds.labels)

_GOOD: Final = frozenset({"ok", "target_invalid", "opted_out", "expired"})
"""Outcomes that are no error of ours or of the provider's."""


async def in_time(sending: Coroutine[Any, Any, Outcome], deadline_seconds: float) -> Outcome:
    """What a send has come to. One that does not keep its deadline is ended: its job would be held for ever.

    It should not happen, and did: below Python 3.12 `asyncio.wait_for`, which libraries use, may lose the cancellation by which
    deadlines end what they wait for. So it is cancelled again and again: a task of its own, which could be left behind, costs
    more than all that is told of a send.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "jobs are handled in tasks"
    before, cancels = task.cancelling(), 0
    again: asyncio.TimerHandle

    def cancel() -> None:
        nonlocal cancels, again
        cancels += 1
        task.cancel()
        again = loop.call_later(OVERTIME_SECONDS, cancel)

    again = loop.call_later(deadline_seconds + OVERTIME_SECONDS, cancel)
    try:
        return await sending
    except asyncio.CancelledError:
        if task.cancelling() != before + cancels or not cancels:
            raise  # somebody else has cancelled it
        _log.error("send_beyond_deadline", seconds=deadline_seconds)
        return Outcome(kind="ambiguous", code="overtime")
    finally:
        again.cancel()
        for _ in range(cancels):
            task.uncancel()


def tell(job: Job, outcome: Outcome, seconds: float) -> None:
    """Count a try that took so long, and log what a person has to look at."""
    _attempts_of(job.channel, outcome.provider, outcome.kind).inc()
    _send_seconds_of(job.channel).observe(seconds)
    if outcome.kind == "ok":
        waited = (datetime.now(UTC) - job.first_at).total_seconds()
        _delay_seconds_of(job.channel).observe(max(0.0, waited))
    point_out(job.channel, outcome)


def origin_nanoseconds(job: Job) -> int:
    """Since when that is stored which a job is about, in Unix nanoseconds; never in the future, as of a job that comes early."""
    return min(int((job.stored_at or job.first_at).timestamp() * 1e9), time.time_ns())


def trace(spans: Spans | None, job: Job, outcome: Outcome, began_at: datetime) -> None:
    """The span of a try that has just ended, where its notification is followed: of a late one, linked to what made it.

    Of a digest one for each of its members that are followed, up to `SPANS_MAX`.
    """
    if spans is None:
        return
    traces = (job.trace,) if job.members is None else job.members.traces.values()
    found = [origin for each in islice(traces, SPANS_MAX) if (origin := followed(each)) is not None]
    origins = [origin for origin in found if spans.room(encode_token(job.tenant))]
    if not origins:
        return
    since = int(began_at.timestamp() * 1e9)
    about: dict[str, str | int] = {
        names.CHANNEL: job.channel,
        names.PROVIDER: outcome.provider,
        names.OUTCOME: outcome.kind,
        names.ATTEMPT_NUMBER: job.attempt + 1,
    }
    for origin in origins:
        span = spans.begin(names.ATTEMPT, origin, about, since=since, stored_at=origin_nanoseconds(job))
        if outcome.kind not in _GOOD:
            failed(span, outcome.kind)
        span.end()
