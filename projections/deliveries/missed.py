"""What a webhook endpoint has missed: notifications of its types that were to go by webhook while it was disabled.

While it is, nothing is planned for it, so there is neither a job nor a dead letter. But the inbox has the records, and
`deliveries` says of each that no endpoint was there for it, or that it was split for others.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from engine.directory.webhooks import WebhookEndpoint
from engine.letters.replaying import NO_ADDRESS
from engine.postgres import Pool, asking
from projections.deliveries.lost import Open
from projections.postgres.versions import live

LOOKED_AT_MAX: Final = 2_000
"""Records that one question looks at: a tenth of a second."""

QUERY_SECONDS: Final = 10.0
"""One question. It sorts what a tenant's users were sent in the time that is asked for: some 0.5 µs for each."""


def _is_of(patterns: str) -> str:
    """SQL: whether the type of a record is one of these. A pattern is a type, the beginning of some (`order.*`), or `*`."""
    return f"""EXISTS (SELECT FROM {patterns} AS p (p) WHERE p IN ('*', l.type)
        OR right(p, 2) = '.*' AND starts_with(l.type, left(p, -1)))"""


# An endpoint has not missed what it was not subscribed to when that came.
_TYPES_THEN: Final = """jsonb_array_elements_text(coalesce((
        SELECT former->'types' FROM webhook_endpoints e, jsonb_array_elements(e.former_types) WITH ORDINALITY AS f (former, n)
        WHERE e.tenant = $1 AND e.id = $8 AND l.stored_at < (former->>'until')::timestamptz ORDER BY n LIMIT 1
    ), to_jsonb($7::text[])))"""

_MISSED: Final = f"""
WITH looked AS (
    SELECT i.tenant, i.user_id, i.id, i.type, i.stored_at, i.withheld, i.record FROM inbox i
    WHERE i.version = {live("inbox")} AND i.tenant = $1 AND ($2::text IS NULL OR i.user_id = $2)
      AND i.stored_at >= $3 AND i.stored_at < $4 AND (i.stored_at, i.user_id, i.id) > ($3, $5, $6)
    ORDER BY i.stored_at, i.user_id, i.id LIMIT {LOOKED_AT_MAX}
)
SELECT l.tenant, l.user_id, l.id, l.stored_at, CASE WHEN
    l.withheld IS NULL
    AND {_is_of("unnest($7::text[])")}
    AND {_is_of(_TYPES_THEN)}
    AND EXISTS (SELECT FROM deliveries w WHERE w.version = {live("deliveries")} AND w.tenant = l.tenant AND w.id = l.id
        AND w.user_id = l.user_id AND w.channel = 'webhook' AND w.device = ''
        AND (w.state = 'split' OR w.reason = '{NO_ADDRESS}'))
    AND NOT EXISTS (SELECT FROM deliveries t WHERE t.version = {live("deliveries")} AND t.tenant = l.tenant AND t.id = l.id
        AND t.user_id = l.user_id AND t.channel = 'webhook' AND t.device = $8
        AND NOT (t.state = 'suppressed' AND t.reason = '{NO_ADDRESS}'))
    THEN l.record END AS record
FROM looked l ORDER BY l.stored_at, l.user_id, l.id
"""


class Place(NamedTuple):
    """A record among those of a tenant, by when it was stored: the next page begins behind it."""

    at: datetime
    user: str = ""
    id: str = ""


async def missed_by(
    pool: Pool, tenant: str, endpoint: WebhookEndpoint, after: Place, until: datetime, limit: int
) -> tuple[list[Open], Place | None]:
    """What an endpoint has missed, the oldest first, and where the next page begins; None: there is none.

    What it was sent, or is being sent, is not among it, and neither is what has a dead letter. A page may be short, or empty.

    Args:
        until: before which the record was stored.

    Raises:
        StoreUnavailable: PostgreSQL does not answer.
    """
    types = list(endpoint.types)
    async with asking(pool, QUERY_SECONDS) as connection:
        rows = await connection.fetch(_MISSED, tenant, endpoint.user, after.at, until, *after[1:], types, endpoint.id)
    found = list[Open]()
    for row in rows:
        if row["record"] is None:
            continue
        place = (row["tenant"], row["user_id"], row["id"], "webhook", endpoint.id)
        stored_at = row["stored_at"]
        found.append(Open(*place, "planned", 0, stored_at, stored_at, "", bytes(row["record"])))
        if len(found) == limit:
            return found, Place(stored_at, row["user_id"], row["id"])
    if len(rows) < LOOKED_AT_MAX:
        return found, None
    return found, Place(rows[-1]["stored_at"], rows[-1]["user_id"], rows[-1]["id"])
