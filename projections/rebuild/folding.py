"""What every rebuild does: fold a partition of a stream into a version that nobody reads yet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from engine.broker.jetstream import Broker
from engine.errors import StepDown, TopologyError
from engine.log.incarnations import epoch_of, stream_of
from engine.patience import patiently
from projections.folds.inbox import moment
from projections.projection import Projection
from projections.replay import Progress, replay
from projections.runner import fold_in
from projections.store import Checkpoint, Store


class Rebuilt(msgspec.Struct):
    """What a rebuild has done."""

    projection: str
    version: int
    records: int
    carried: int
    tenant: str | None = None


class Horizon(NamedTuple):
    """Where the stream of a partition begins: what is before `oldest` in `epoch` cannot be folded.

    Attributes:
        oldest: the first sequence that will be folded; of an empty stream the one behind its end.
        at: when it was stored; None: the stream holds nothing.
        trimmed: whether the stream has lost its beginning.
    """

    epoch: str
    oldest: int
    at: datetime | None
    trimmed: bool = False


Begin = Callable[[int, datetime], Awaitable[Checkpoint]]
"""`begin(first, at)`: carry over what comes before record `first`, which was stored at `at`, and store the checkpoint there."""


class Partition:
    """One partition that is folded anew.

    Args:
        tenant: only this tenant's records.
        progress: told how far it is folded, now and then.
    """

    def __init__(
        self, broker: Broker, projection: Projection, number: int, progress: Progress, tenant: str | None = None
    ) -> None:
        self._broker = broker
        self.number = number
        self.stream = projection.stream(number)
        self.subject = projection.subject(number, tenant)
        self._progress = progress
        self.records = 0

    async def horizon(self) -> Horizon:
        """Where the stream begins now."""
        state = await patiently(stream_of, self._broker, self.stream)
        epoch = epoch_of(state)
        oldest = await patiently(self._broker.leader_next, self.stream, self.subject, 1)
        if oldest is None:
            return Horizon(epoch, state.last_seq + 1, None, state.first_seq > 1)
        return Horizon(epoch, oldest.seq, datetime.fromisoformat(oldest.time), state.first_seq > 1)

    async def head(self) -> int:
        """The sequence of the newest record; 0 when there is none."""
        newest = await patiently(self._broker.leader_last, self.stream, self.subject)
        return newest.seq if newest is not None else 0

    async def fold(self, store: Store, target: int, oldest: int, begin: Begin) -> None:
        """Fold what the store has not yet, up to `target`; the first time from `oldest` on, behind what `begin` carries over.

        Raises:
            TopologyError: another rebuild writes to the same version.
        """
        at = await patiently(store.checkpoint)
        start = oldest if at is None else at.seq + 1
        async for batch in replay(self._broker, self.stream, self.subject, start, target):
            if at is None:
                at = await begin(batch[0].seq, moment(batch[0].time_nanoseconds))
            reached = Checkpoint(at.epoch, batch[-1].seq)
            try:
                await fold_in(store, batch, at, reached)
            except StepDown as error:
                raise another_rebuild() from error
            at = reached
            self.records += len(batch)
            self._progress(f"partition {self.number}", at.seq, target)
        if at is None:  # what there is comes after `target`, or there is nothing
            await begin(max(target + 1, oldest), datetime.now(UTC))


def another_rebuild() -> TopologyError:
    """The error of the one of two rebuilds that gives up."""
    return TopologyError("another rebuild has begun", "Run one rebuild of a projection at a time.")
