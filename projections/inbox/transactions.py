"""What has become of a transaction's notifications, as far as the inbox is folded, and which of them can be recalled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from engine.postgres import Pool, asking
from projections.postgres.versions import live
from projections.store import Checkpoint

QUERY_SECONDS: Final = 5.0
"""One question. It looks at every notification of the transaction: a few microseconds each, with the index."""

_WHICH: Final = f"version = {live('inbox')} AND tenant = $1 AND transaction_id = $2"
_SEEN: Final = "read_seq IS NOT NULL AND (recalled_seq IS NULL OR read_seq < recalled_seq)"

_FATES: Final = f"""
SELECT count(*) FILTER (WHERE withheld = 'cancelled') AS cancelled,
       count(*) FILTER (WHERE withheld IS NULL AND recalled_seq IS NOT NULL AND NOT ({_SEEN})) AS recalled,
       count(*) FILTER (WHERE withheld IS NULL AND {_SEEN}) AS seen,
       count(*) FILTER (WHERE withheld IS NULL AND recalled_seq IS NULL AND NOT ({_SEEN})) AS open
FROM inbox WHERE {_WHICH}
"""

_RECALLABLE: Final = f"""
SELECT user_id, id FROM inbox
WHERE {_WHICH} AND withheld IS NULL AND recalled_seq IS NULL AND (user_id, id) > ($3, $4)
ORDER BY user_id, id LIMIT $5
"""

_CHECKPOINTS: Final = f"""
SELECT partition, epoch, seq FROM projection_checkpoints
WHERE projection = 'inbox' AND version = {live("inbox")}
"""


class Fates(NamedTuple):
    """Notifications of a transaction by what became of them; each is counted once.

    Attributes:
        cancelled: stored for nobody to see.
        recalled: taken off before their users had read them.
        seen: read before they were recalled, if they were.
        open: dispatched, and neither read nor recalled.
    """

    cancelled: int
    recalled: int
    seen: int
    open: int


class Transactions:
    """Reads of the table in PostgreSQL."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def fates(self, tenant: str, transaction: str) -> Fates:
        """What became of the notifications that are folded.

        Raises:
            StoreUnavailable: no answer in time.
        """
        if "\0" in tenant + transaction:
            return Fates(0, 0, 0, 0)  # PostgreSQL knows no NUL: no row has such a name
        async with asking(self._pool, QUERY_SECONDS) as connection:
            [row] = await connection.fetch(_FATES, tenant, transaction)
        return Fates(row["cancelled"], row["recalled"], row["seen"], row["open"])

    async def recallable(
        self, tenant: str, transaction: str, after: tuple[str, str], limit: int
    ) -> list[tuple[str, str]]:
        """The next notifications that can be recalled, as user and id, in that order.

        Raises:
            StoreUnavailable: no answer in time.
        """
        if "\0" in tenant + transaction:
            return []
        async with asking(self._pool, QUERY_SECONDS) as connection:
            rows = await connection.fetch(_RECALLABLE, tenant, transaction, *after, limit)
        return [(row["user_id"], row["id"]) for row in rows]

    async def has_passed(self, heads: Mapping[int, Checkpoint]) -> bool:
        """Whether the inbox is folded up to these positions, by partition.

        Raises:
            StoreUnavailable: no answer in time.
        """
        async with asking(self._pool, QUERY_SECONDS) as connection:
            rows = await connection.fetch(_CHECKPOINTS)
        reached = {row["partition"]: Checkpoint(row["epoch"], row["seq"]) for row in rows}
        return all(
            head.seq == 0 or ((at := reached.get(p)) is not None and at.epoch == head.epoch and at.seq >= head.seq)
            for p, head in heads.items()
        )
