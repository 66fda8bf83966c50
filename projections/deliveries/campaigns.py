"""What became of a campaign's notifications, channel by channel, as far as the inbox and the deliveries are folded."""

from __future__ import annotations

from typing import Final

import msgspec

from engine.campaigns.commands import NoCampaign
from engine.postgres import LOOK_SECONDS, Pool, asking
from projections.postgres.versions import live

# By ids of pages, which both tables are ordered by within a tenant; so the other notifications cost nothing.
_COUNT: Final = f"""
WITH pages AS MATERIALIZED (
    SELECT campaign || ':' || number AS id FROM campaign_pages
    WHERE tenant = $1 AND campaign = $2 AND state IN ('published', 'done')
)
SELECT d.channel, d.state, d.reason, count(*)::bigint AS count
FROM pages JOIN deliveries d ON d.version = {live("deliveries")} AND d.tenant = $1 AND d.id = pages.id
WHERE d.device = '' AND d.channel <> 'inapp' GROUP BY 1, 2, 3
UNION ALL
SELECT 'inapp', CASE WHEN i.withheld IS NOT NULL THEN i.withheld WHEN i.read_seq IS NOT NULL THEN 'read'
                     WHEN i.recalled_seq IS NOT NULL THEN 'recalled' ELSE 'stored' END, '', count(*)::bigint
FROM pages JOIN inbox i ON i.version = {live("inbox")} AND i.tenant = $1 AND i.id = pages.id GROUP BY 1, 2
"""


class ChannelCounts(msgspec.Struct, frozen=True):
    """Notifications of a campaign on one channel; `total` is the sum of `states`.

    Args:
        states: by what is known of each. In the app: `stored`, `read`, `recalled`, and `cancelled` or `expired` where the record
            is shown to nobody. Elsewhere as deliveries say: `planned` and what follows, or `suppressed`, `cancelled`, `expired`.
        reasons: why, where a reason is known.
    """

    total: int
    states: dict[str, int]
    reasons: dict[str, int]


class CampaignChannels:
    """Reads of the tables in PostgreSQL."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def of(self, tenant: str, id: str) -> dict[str, ChannelCounts]:
        """The channels of a campaign, as of one moment.

        It looks at each notification, so it takes a second for some hundred thousand.

        Raises:
            NoCampaign. StoreUnavailable: also where counting takes longer than 30 s.
        """
        async with asking(self._pool, LOOK_SECONDS) as connection:
            known = await connection.fetchval("SELECT true FROM campaigns WHERE tenant = $1 AND id = $2", tenant, id)
            rows = await connection.fetch(_COUNT, tenant, id)
        if not known:
            raise NoCampaign(f"there is no campaign {id!r}")
        found: dict[str, ChannelCounts] = {}
        for row in rows:
            before = found.get(row["channel"], ChannelCounts(0, {}, {}))
            reasons = {row["reason"]: row["count"]} if row["reason"] else {}
            found[row["channel"]] = ChannelCounts(
                before.total + row["count"],
                _added(before.states, {row["state"]: row["count"]}),
                _added(before.reasons, reasons),
            )
        return found


def _added(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return counts | {name: counts.get(name, 0) + count for name, count in more.items()}
