"""The funnel of the last hour, folded as time passes: what was dispatched in five minutes is counted once, when it has settled.

A cohort is counted ten minutes after its end, and not before the projections have folded everything up to that moment. So each
notification is read once, and the numbers depend on what was stored, not on when a projector looked.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from engine.broker.jetstream import Broker
from engine.postgres import Pool, asking
from projections.projection import IN_TABLES

WINDOW: Final = timedelta(hours=1)

COHORT: Final = timedelta(minutes=5)
"""Receipts are read around each cohort: a shorter one reads the same receipts more often, a longer one shows less often."""

SETTLED: Final = timedelta(minutes=10)
"""From the end of a cohort until it is counted: whoever is connected has acknowledged by then, and may have read."""


class Step(msgspec.Struct, frozen=True):
    """One row of the funnel: how many came how far.

    Attributes:
        emitted: events; EVENTS stores an event before it is dispatched, so `stored` is the same number.
        dispatched: notifications, one for each user; the following are parts of these.
    """

    tenant: str
    type: str
    channel: str
    emitted: int
    stored: int
    dispatched: int
    sent: int
    acknowledged: int
    read: int


STAGES: Final = ("emitted", "stored", "dispatched", "sent", "acknowledged", "read")


class Cohorts:
    """The cohorts of an hour; older ones are forgotten."""

    def __init__(self) -> None:
        self._counted: deque[tuple[datetime, list[Step]]] = deque()
        self._until: datetime | None = None

    def due(self, now: datetime) -> Iterator[tuple[datetime, datetime]]:
        """The cohorts that have settled and are not counted yet, oldest first. Everything stored before `now` must be folded."""
        last = whole(now - SETTLED)
        since = max(self._until or last - WINDOW, last - WINDOW)
        while since < last:
            yield since, since + COHORT
            since += COHORT

    def add(self, until: datetime, steps: list[Step]) -> None:
        """Add a cohort that was counted and ends at `until`."""
        self._until = until
        self._counted.append((until, steps))
        while self._counted[0][0] <= until - WINDOW:
            self._counted.popleft()

    def total(self) -> list[Step]:
        """All cohorts together. An event whose records stand in two of them is emitted in both."""
        counts: dict[tuple[str, str, str], Counter[str]] = {}
        for _, steps in self._counted:
            for step in steps:
                counted = counts.setdefault((step.tenant, step.type, step.channel), Counter())
                counted.update({stage: getattr(step, stage) for stage in STAGES})
        return [Step(*key, *(counted[stage] for stage in STAGES)) for key, counted in sorted(counts.items())]


def whole(at: datetime) -> datetime:
    """The last end of a cohort at or before `at`: the same for every projector."""
    seconds = COHORT.total_seconds()
    return datetime.fromtimestamp(at.timestamp() // seconds * seconds, UTC)


async def folded_until(broker: Broker, pool: Pool, partitions: int) -> datetime:
    """The moment before which everything that was stored is in the tables.

    Raises:
        StoreUnavailable, BrokerError: it cannot be told.
    """
    until = datetime.now(UTC)
    async with asking(pool) as connection:
        rows = await connection.fetch(
            "SELECT c.projection, c.partition, c.seq FROM projection_checkpoints c JOIN projection_versions v"
            " USING (projection, version)"
        )
    at = {(row["projection"], row["partition"]): row["seq"] for row in rows}
    for projection in IN_TABLES.values():
        for p in range(partitions):
            start = at.get((projection.name, p), 0) + 1
            waiting = await broker.leader_next(projection.stream(p), projection.subject(p), start)
            if waiting is not None:
                until = min(until, datetime.fromisoformat(waiting.time))
    return until
