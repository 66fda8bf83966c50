"""What workers ask before they send what has waited: who has seen it, and what is still open of a digest.

These are the `Tables` of `engine.worker.caughtup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import asyncpg

from engine.postgres import Pool, asking
from engine.worker.caughtup import Heads, Known, Place
from projections.folds.changes import clean
from projections.postgres.versions import live

QUERY_SECONDS: Final = 5.0
"""One question. The largest is for the records of a week: some 20 µs for each."""

_PASSED: Final = f"""
SELECT projection, epoch, seq FROM projection_checkpoints
WHERE partition = $1 AND (projection = 'inbox' AND version = {live("inbox")}
    OR projection = 'deliveries' AND version = {live("deliveries")})
"""

# That a device was sent a position only, as the record is not for the screen, proves nothing.
_SEEN: Final = f"""
i.shown AND EXISTS (
    SELECT FROM delivery_ranges r
    WHERE r.version = {live("deliveries")} AND r.tenant = i.tenant AND r.user_id = i.user_id AND r.epoch = i.epoch
      AND r.up_to >= i.seq AND r.after_seq < i.seq AND r.state = 'acknowledged')
OR EXISTS (
    SELECT FROM deliveries s
    WHERE s.version = {live("deliveries")} AND s.tenant = i.tenant AND s.id = i.id AND s.user_id = i.user_id
      AND s.state IN ('acknowledged', 'seen', 'read'))
"""

_FACTS: Final = """
i.id, i.stored_at, coalesce(i.type, '') AS type, i.category, i.channels, i.expires_at, i.transaction_id AS transaction,
    {seen} AS seen, i.read_seq IS NOT NULL AS read, i.archived_seq IS NOT NULL AS archived,
    i.recalled_seq IS NOT NULL AS recalled, i.superseded_seq IS NOT NULL AS superseded
"""

_KNOWN: Final = f"""
SELECT {_FACTS.format(seen=f"({_SEEN})")} FROM inbox i
WHERE i.version = {live("inbox")} AND i.tenant = $1 AND i.user_id = $2 AND i.id = ANY($3)
ORDER BY i.era DESC, i.seq DESC
"""

# A try that was begun and forgotten is made again, so what it was about is open, too: else nobody would send it.
_OPEN: Final = "(d.state IN ('planned', 'queued') OR d.state = 'ambiguous' AND d.reason = 'forgotten')"

# A user's records are found by an index, and what was planned of each by another: a join by statistics might read months.
_PLANNED: Final = f"""
SELECT {_FACTS.format(seen="false")}, p.trace, p.attempts FROM inbox i CROSS JOIN LATERAL (
    SELECT d.trace, d.attempts FROM deliveries d
    WHERE d.version = {live("deliveries")} AND d.tenant = i.tenant AND d.id = i.id AND d.user_id = i.user_id
      AND d.channel = $3 AND d.device = '' AND d.plan_when = $4 AND {_OPEN} LIMIT 1) p
WHERE i.version = {live("inbox")} AND i.tenant = $1 AND i.user_id = $2 AND i.stored_at >= $5
ORDER BY i.era DESC, i.seq DESC LIMIT $6
"""

_RECORDS: Final = f"""
SELECT id, record FROM inbox WHERE version = {live("inbox")} AND tenant = $1 AND user_id = $2 AND id = ANY($3)
"""


class NoticedTables:
    """Reads of both projections in PostgreSQL. Every call raises StoreUnavailable where there is no answer in time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def passed(self, heads: Heads) -> bool:
        """Whether both projections hold everything up to these."""
        async with asking(self._pool, QUERY_SECONDS) as connection:
            rows = await connection.fetch(_PASSED, heads.partition)
        reached = {row["projection"]: Place(row["epoch"], row["seq"]) for row in rows}
        wanted = {"inbox": heads.log, "deliveries": heads.receipts}
        return all(head.seq == 0 or _beyond(reached.get(name), head) for name, head in wanted.items())

    async def known(self, tenant: str, user: str, ids: Sequence[str]) -> list[Known]:
        """Of these notifications those that there are, newest first."""
        async with asking(self._pool, QUERY_SECONDS) as connection:
            return _known(await connection.fetch(_KNOWN, tenant, user, list(map(clean, ids))))

    async def planned(
        self, tenant: str, user: str, channel: str, when: str, since: datetime, limit: int
    ) -> list[Known]:
        """The notifications stored since then that were planned so and have not ended; newest first."""
        async with asking(self._pool, QUERY_SECONDS) as connection:
            return _known(await connection.fetch(_PLANNED, tenant, user, channel, clean(when), since, limit))

    async def records(self, tenant: str, user: str, ids: Sequence[str]) -> dict[str, bytes]:
        """Their records as the log had them, by id."""
        async with asking(self._pool, QUERY_SECONDS) as connection:
            rows = await connection.fetch(_RECORDS, tenant, user, list(map(clean, ids)))
        return {row["id"]: bytes(row["record"]) for row in rows}


def _beyond(reached: Place | None, head: Place) -> bool:
    return reached is not None and reached.epoch == head.epoch and reached.seq >= head.seq


def _known(rows: list[asyncpg.Record]) -> list[Known]:
    return [Known(**{**dict(row), "channels": tuple(row["channels"])}) for row in rows]
