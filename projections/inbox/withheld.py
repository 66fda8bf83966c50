"""How many records of an event are shown to nobody: a pager asks this of pages of campaigns that were cancelled, or are over."""

from __future__ import annotations

from typing import Final

from engine.campaigns.states import Withheld
from engine.postgres import Pool, asking
from projections.inbox.transactions import Transactions
from projections.postgres.versions import live
from projections.store import Checkpoint
from seamark.protocol.cursor import parse_cursor

_COUNT: Final = f"""
SELECT count(*) FILTER (WHERE withheld = 'cancelled') AS cancelled, count(*) FILTER (WHERE withheld = 'expired') AS expired
FROM inbox WHERE version = {live("inbox")} AND tenant = $1 AND id = $2
"""


class WithheldRecords:
    """Reads of the inbox in PostgreSQL. A `Folds` of `engine.campaigns.pager`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._checkpoints = Transactions(pool)

    async def withheld(self, tenant: str, event: str, heads: dict[str, str]) -> Withheld | None:
        """Those of one event; None: the inbox is not folded up to these heads yet.

        Raises:
            StoreUnavailable: no answer in time.
        """
        wanted = {int(partition): Checkpoint(*parse_cursor(head)) for partition, head in heads.items()}
        if not await self._checkpoints.has_passed(wanted):
            return None
        async with asking(self._pool) as connection:
            row = await connection.fetchrow(_COUNT, tenant, event)
        assert row is not None, "a count is always there"
        return Withheld(row["cancelled"], row["expired"])
