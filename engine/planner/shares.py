"""How much a tenant may have waiting in JOBS, so that nobody's jobs wait for want of room.

JOBS has no bound of its own, for a stream with schedules cannot refuse; its watermark says how much it may hold. A tenant may
hold as much as is still free below it: one alone half of it, two that flood it a third each, and whoever comes next finds room
(the dynamic threshold of Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", IEEE/ACM
Transactions on Networking 6(2), 1998). What is critical may fill four times as much as is free: it goes on long after the rest,
and a tenant that says it of everything leaves others a fifth. A tenant above that is not waited for: its jobs end as `throttled`.

Planners ask before they make a job, and workers before they split one, for that makes up to a hundred of it.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Iterable
from typing import Final, NamedTuple

import structlog

from engine import metrics
from engine.broker.answers import WATERMARK_KEY
from engine.broker.jetstream import Broker, StreamState
from engine.errors import BrokerError
from engine.limits import JOBS_SUBJECTS_MAX
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import JOBS_STREAM, encode_token

_log = structlog.get_logger("seamark.planner")

SHARES_KEPT_SECONDS: Final = 5.0
"""How long an answer is used. Planners make some 10 000 jobs a second at most: 50 MB, little beside the watermark."""

SHARES_DEADLINE_SECONDS: Final = 1.0
"""How long a round waits for answers; a tenant that nobody has said anything about is not held back."""


ALWAYS: Final = 0.01
"""Of the most, what a tenant may hold even where nothing is free: others may have filled it together."""

CRITICAL: Final = 4
"""How many times as much as is free a tenant may hold when it adds what is critical: one alone four fifths of all."""


class Held(NamedTuple):
    """What waits, or may wait. `subjects`: each schedule is one, and so is each user with jobs in a lane of a channel."""

    bytes: float
    subjects: int


def most(jobs: StreamState) -> Held:
    """What all tenants together may have waiting."""
    return Held(int(jobs.metadata.get(WATERMARK_KEY, sys.maxsize)), JOBS_SUBJECTS_MAX)


def is_above(mine: Held, all_: Held, most_: Held, times: float = 1) -> bool:
    """Whether a tenant holds more than `times` what is still free, and more than nobody is denied. Who holds nothing does not."""
    return mine.bytes > max(most_.bytes * ALWAYS, times * (most_.bytes - all_.bytes)) or mine.subjects > max(
        most_.subjects * ALWAYS, times * (most_.subjects - all_.subjects)
    )


class Above(NamedTuple):
    """Tenants that get no more jobs for now. `critical`: those that get not even critical ones."""

    tenants: frozenset[str] = frozenset()
    critical: frozenset[str] = frozenset()

    def holds(self, tenant: str, *, critical: bool) -> bool:
        """Whether a tenant gets no more such jobs."""
        return tenant in (self.critical if critical else self.tenants)


class Shares:
    """Which tenants hold too much, as of a few seconds ago. All logs of a process ask the same one."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._jobs: StreamState | None = None
        self._looked_at = -math.inf
        self._above: dict[str, tuple[bool, bool]] = {}

    async def above(self, tenants: Iterable[str]) -> Above:
        """Those of `tenants` that get no more jobs for now. Where the broker does not say, nobody is held back."""
        if time.monotonic() - self._looked_at > SHARES_KEPT_SECONDS:
            self._looked_at, self._jobs = time.monotonic(), None
            self._above.clear()
        asked = frozenset(tenants)
        try:
            async with asyncio.timeout(SHARES_DEADLINE_SECONDS):
                if self._jobs is None:
                    self._jobs = await self._broker.stream(JOBS_STREAM)
                    metrics.jobs_subjects.set(self._jobs.subjects)
                await self._ask(self._jobs, asked)
        except (BrokerError, TimeoutError) as error:
            _log.warning("shares_not_read", error=type(error).__name__)
        found = {one: self._above.get(one, (False, False)) for one in asked}
        return Above(*(frozenset(one for one, above in found.items() if above[which]) for which in (0, 1)))

    async def _ask(self, jobs: StreamState, tenants: frozenset[str]) -> None:
        all_ = Held(jobs.bytes, jobs.subjects)
        if not is_above(all_, all_, most(jobs)):
            return  # nobody holds more than all together
        for tenant in tenants - self._above.keys():
            mine = await self._held_by(tenant, jobs)
            self._above[tenant] = is_above(mine, all_, most(jobs)), is_above(mine, all_, most(jobs), CRITICAL)
            if self._above[tenant][0]:
                _log.warning("tenant_throttled", tenant=tenant)

    async def _held_by(self, tenant: str, jobs: StreamState) -> Held:
        """What a tenant holds: its messages, each as large as the average one."""
        try:
            token = encode_token(tenant)
        except InvalidToken:
            return Held(0, 0)
        messages = subjects = 0
        for filter_ in (f"job.*.*.{token}.*", f"jobsched.*.{token}.*.*"):
            count, found = await self._broker.count(JOBS_STREAM, filter_)
            messages, subjects = messages + count, subjects + found
        return Held(messages * jobs.bytes / max(1, jobs.messages), subjects)
