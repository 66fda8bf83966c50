"""What `deliveries` knows of one job: how it has ended, for workers whose claim may be lost, and for replays of dead letters.

The table lags behind the receipts. It is believed once it has folded all that was stored ten minutes before the question.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, cast

from engine.broker.jetstream import Broker
from engine.channels.channel import Job
from engine.errors import StoreUnavailable
from engine.jobs.claims import Done, End
from engine.letters.replaying import Known
from engine.log.incarnations import epoch_of, stream_of
from engine.postgres import Pool, asking
from projections.folds.deliveries import ARRIVED, try_of
from projections.postgres.versions import live, read_place
from projections.projection import DELIVERIES
from seamark.protocol.subjects import RECEIPTS_STREAM, encode_token, partition_of

LAG: Final = timedelta(minutes=10)
"""What was stored so long ago must be folded. A claim is let go of 15 minutes after its job has ended, at the earliest."""

_ROW: Final = f"""
SELECT state, reason, rank, attempts FROM deliveries WHERE version = {live("deliveries")}
    AND tenant = $1 AND user_id = $2 AND id = $3 AND channel = $4 AND device = $5
"""

_ENDS: Final = frozenset({"sent", "failed", "suppressed", "expired", "cancelled", "split"})
"""States in which a job has ended. `ambiguous` is none: it may be what was said before another try."""


class JobEnds:
    """What the table knows of jobs."""

    def __init__(self, pool: Pool, broker: Broker, partitions: int) -> None:
        self._pool, self._broker, self._partitions = pool, broker, partitions

    async def known(self, job: Job) -> Known | None:
        """The state of the job's delivery, and the number of the try it is about; None: nothing of its channel is folded.

        Raises:
            StoreUnavailable: it does not answer, or has not folded what was stored ten minutes ago.
        """
        row = await self._row(job)
        return None if row is None else Known(*row)

    async def ended(self, job: Job) -> Done | None:
        """How the job has ended in this life; None: it has not, as far as is known.

        Raises:
            StoreUnavailable: as `known`.
        """
        row = await self._row(job)
        if row is None:
            return None
        state, reason, number = row
        if number <= job.tries_before:
            return None
        end = "sent" if state in ARRIVED else state
        return Done(number - job.tries_before - 1, cast("End", end), reason) if end in _ENDS else None

    async def _row(self, job: Job) -> tuple[str, str, int] | None:
        tenant, user = encode_token(job.tenant), encode_token(job.user)
        await self._check_folded(partition_of(tenant, user, self._partitions))
        async with asking(self._pool) as connection:
            row = await connection.fetchrow(_ROW, job.tenant, job.user, job.id, job.channel, job.target)
        if row is None:
            return None
        number = row["attempts"] if row["state"] in ARRIVED else try_of(max(0, row["rank"]))
        return row["state"], row["reason"], number

    async def _check_folded(self, partition: int) -> None:
        """Pass if all that was stored ten minutes ago is folded."""
        async with asking(self._pool) as connection:
            place = await read_place(connection, DELIVERIES.name, RECEIPTS_STREAM, partition)
        receipts = await stream_of(self._broker, RECEIPTS_STREAM)
        if place is not None and place.checkpoint.epoch != epoch_of(receipts):
            raise StoreUnavailable("deliveries are folded from another incarnation of RECEIPTS")
        after = 1 if place is None else place.checkpoint.seq + 1
        waiting = await self._broker.leader_next(RECEIPTS_STREAM, DELIVERIES.subject(partition), after)
        if waiting is not None and datetime.now(UTC) - datetime.fromisoformat(waiting.time) > LAG:
            raise StoreUnavailable(
                "deliveries have not folded what was stored ten minutes ago: is a projector running?"
            )
