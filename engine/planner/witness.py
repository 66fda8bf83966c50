"""The witness of the planners' marks, in PostgreSQL: how far each log was planned, a few seconds ago.

JOBS that were put back to a backup show a mark from before. Whoever went on from there would have everything since then sent
again. The witness remembers what the backup does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from engine.broker.jetstream import StreamState
from engine.log.incarnations import inherited
from engine.postgres import Pool, asking

_READ: Final = "SELECT epoch, seq FROM plan_witnesses WHERE partition = $1"

# Who was overtaken meanwhile knows another row: it changes nothing.
_BEGIN: Final = """
INSERT INTO plan_witnesses AS w (partition, epoch, seq) VALUES ($1, $2, $3)
ON CONFLICT (partition) DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq, noted_at = now()
WHERE w.epoch = $4 AND w.seq = $5 AND (w.epoch, w.seq) <> (excluded.epoch, excluded.seq)
"""
_NOTE: Final = """
UPDATE plan_witnesses w SET seq = o.seq, noted_at = now()
FROM unnest($1::integer[], $2::text[], $3::bigint[]) AS o (partition, epoch, seq)
WHERE w.partition = o.partition AND w.epoch = o.epoch AND w.seq < o.seq
"""


class Witness(NamedTuple):
    """A log was planned up to `seq`, or further, in the incarnation `epoch`."""

    epoch: str
    seq: int

    def in_log(self, log: StreamState) -> int | None:
        """The same in the present incarnation of the log; None: it is about another log, which was made anew since."""
        if self.epoch == log.epoch:
            return self.seq
        shared = inherited(log).get(self.epoch)
        return None if shared is None else min(shared, self.seq)


class Witnesses:
    """The table. Every call raises StoreUnavailable or StoreBroken as `asking` does."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def of(self, partition: int) -> Witness | None:
        """What is known of a log; None: it was never planned."""
        async with asking(self._pool) as connection:
            row = await connection.fetchrow(_READ, partition)
        return None if row is None else Witness(row["epoch"], row["seq"])

    async def begin(self, partition: int, now: Witness, seen: Witness | None) -> None:
        """Note where an owner goes on, in place of what it has seen."""
        before = seen or Witness("", 0)
        async with asking(self._pool) as connection:
            await connection.execute(_BEGIN, partition, *now, *before)

    async def note(self, reached: Mapping[int, Witness]) -> None:
        """Note how far logs are planned by now. What is known of another incarnation, or from later, stands."""
        if reached:
            rows = [(partition, *witness) for partition, witness in sorted(reached.items())]
            async with asking(self._pool) as connection:
                await connection.execute(_NOTE, *map(list, zip(*rows, strict=True)))
