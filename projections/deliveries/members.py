"""Which notifications a digest was made of, long after its claim is gone: those whose tries a provider calls by one name."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from engine.jobs.digests import key_in
from engine.postgres import Pool, asking
from projections.folds.deliveries import named
from projections.postgres.versions import live

QUERY_SECONDS: Final = 5.0
"""It looks at the records of a window, which is a week at most: some 20 µs for each."""

MEMBERS_MAX: Final = 10_000

WINDOW: Final = timedelta(days=8)
"""The longest window is a week, which is an hour longer where clocks are set back."""

_MEMBERS: Final = f"""
SELECT i.id, d.trace FROM inbox i CROSS JOIN LATERAL (
    SELECT d.trace FROM deliveries d
    WHERE d.version = {live("deliveries")} AND d.tenant = i.tenant AND d.id = i.id AND d.user_id = i.user_id
      AND d.channel = $3 AND d.plan_when = $4 AND $5 = ANY(string_to_array(d.provider_ids, E'\n')) LIMIT 1) d
WHERE i.version = {live("inbox")} AND i.tenant = $1 AND i.user_id = $2 AND i.stored_at >= $6
ORDER BY i.era DESC, i.seq DESC LIMIT {MEMBERS_MAX}
"""


async def members_of(
    pool: Pool, tenant: str, user: str, channel: str, digest: str, *, attempt: int, provider: str, provider_id: str
) -> dict[str, str]:
    """The ids of a digest's members with their traces ("": none), as far as receipts of its sending are folded.

    Args:
        digest: the id of its job.
        attempt: the number of the try, from 1.
        provider_id: what the provider calls the message.

    Raises:
        StoreUnavailable: PostgreSQL does not answer.
    """
    key = key_in(digest)
    try:
        since = datetime.fromisoformat(key.rpartition("/")[2]) - WINDOW
    except (ValueError, OverflowError):
        return {}  # an event may have such an id, too
    line = named(attempt, provider, provider_id)
    async with asking(pool, QUERY_SECONDS) as connection:
        rows = await connection.fetch(_MEMBERS, tenant, user, channel, f"digest:{key}", line, since)
    return {row["id"]: row["trace"] for row in rows}
