"""Runner glue: a projection as the worker of a partition reader.

The checkpoint is stored in the transaction of the effect, and applied only if it is the one this projector expects. So an
older projector that wakes up changes nothing, and a batch whose outcome is unknown is settled by reading the checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import structlog

from engine.broker.jetstream import Broker, StreamState
from engine.errors import BrokerError, PartitionStopped, StepDown, StoreBroken, StoreUnavailable
from engine.log.incarnations import CLOCKS, epoch_of, reaching, stream_of
from engine.partition.reader import Delivered, PartitionReader, Phase
from engine.patience import PATIENCE_SECONDS, patiently
from engine.tasks import end_if_cancelled
from engine.traces import names
from engine.traces.messages import working
from engine.traces.spans import active
from projections import metrics
from projections.projection import Projection
from projections.store import Checkpoint, Store
from seamark.protocol.errors import SeamarkError

_log = structlog.get_logger("seamark.projection")

LAG_SECONDS = 5.0
"""How often the lag of a partition is measured while nothing is folded in it: two questions to the broker."""


@dataclass(frozen=True, slots=True)
class _Short:
    """A log was seen to end before a checkpoint: when for the first time, and whether a later look has seen it, too."""

    checkpoint: Checkpoint
    at: datetime
    confirmed: bool


class _Batch(NamedTuple):
    """Records, the checkpoint that they follow, and the one behind them."""

    records: list[Delivered]
    expected: Checkpoint | None
    reached: Checkpoint


class ProjectionWorker:
    """One partition of one projection. A `partition.Worker`."""

    def __init__(self, broker: Broker, projection: Projection, partition: int, store: Store) -> None:
        self._broker = broker
        self._name = projection.name
        self._stream = projection.stream(partition)
        self._subject = projection.subject(partition)
        self._store = store
        self._spans, self._consumer = active(), projection.source(partition).consumer
        self._hop = names.FOLD if projection.kind == "log" else names.FOLD_RECEIPT
        self._expected: Checkpoint | None = None
        self._failed: _Batch | None = None
        self._short: _Short | None = None
        self._epoch = ""
        self._log = _log.bind(projection=self._name, stream=self._stream)
        self._lag = metrics.projection_lag.labels(self._name, self._stream, self._subject)
        self._lag_set_at = 0.0
        self._looked = False
        self._oldest_due_at: float | None = None
        self._applied = metrics.projection_applied.labels(self._name, self._stream)

    async def acquire(self) -> int:
        """Read the checkpoint; nothing is taken over, for only a projector with the right checkpoint changes anything."""
        next_seq, self._expected, self._epoch = await self._look()
        return next_seq

    async def position(self) -> int:
        """The sequence to read next."""
        return (await self._look())[0]

    async def _look(self) -> tuple[int, Checkpoint | None, str]:
        if self._failed is not None:
            # A stopped partition finds out in this way whether it was repaired, and goes on only when that very batch is stored.
            failed, self._failed = self._failed, None
            with contextlib.suppress(StepDown):
                await self._apply(failed)
        with self._stopping("its checkpoint cannot be read"):
            checkpoint = await patiently(self._store.checkpoint, seconds=math.inf)
        self._looked = True
        state = await stream_of(self._broker, self._stream)
        epoch = epoch_of(state)
        if checkpoint is None:
            return max(1, state.first_seq), None, epoch
        if checkpoint.epoch != epoch:
            raise self._stopped()
        await self._check_reach(await reaching(self._broker, state, checkpoint.seq), checkpoint)
        return checkpoint.seq + 1, checkpoint, epoch

    async def _check_reach(self, state: StreamState, checkpoint: Checkpoint) -> None:
        """Is the stream as long as it was when it was folded? Else it was put back to a backup, and nobody has said so."""
        if checkpoint.seq > state.last_seq:
            # Remembered: other records are given these numbers soon, and then it would look as if they had been folded.
            again = self._short is not None and self._short.checkpoint == checkpoint
            at = self._short.at if self._short is not None and again else datetime.now(UTC)
            self._short = _Short(checkpoint, at, confirmed=again)
        elif self._short is None or self._short.checkpoint != checkpoint or await self._was_there(state, self._short):
            self._short = None
            return
        raise PartitionStopped(
            f"{self._name} was folded up to record {checkpoint.seq} of {self._stream}, which has gone back since",
            f"It was restored from a backup: run `seamark topology restore {self._stream}`, "
            f"then `seamark rebuild {self._name}`.",
        )

    async def _was_there(self, state: StreamState, short: _Short) -> bool:
        """Was the record there when the log seemed to end before it, whatever a leader that was being replaced has shown?"""
        seq = short.checkpoint.seq
        if state.first_seq > seq:
            return True  # trimmed since: nothing is left of what could have been passed over
        stored = await self._broker.leader_next(self._stream, ">", seq)
        # One look alone is most likely such a leader, and in a busy log the record is but a moment older.
        before = short.at - CLOCKS if short.confirmed else short.at
        return stored is not None and stored.seq == seq and datetime.fromisoformat(stored.time) < before

    def check(self, state: StreamState) -> None:
        """Is it still the stream the checkpoint counts in?"""
        if epoch_of(state) != self._epoch:
            raise self._stopped()

    def _stopped(self) -> PartitionStopped:
        return PartitionStopped(
            f"{self._name} was folded from another incarnation of {self._stream}",
            f"Run `seamark rebuild {self._name}`.",
        )

    async def handle(self, batch: list[Delivered]) -> None:
        """Fold a batch in, whatever it takes.

        Raises:
            StepDown: another projector was here.
        """
        reached = Checkpoint(self._epoch, batch[-1].seq)
        if self._spans is None:
            await self._apply(_Batch(batch, self._expected, reached))
        else:
            with working(self._spans, self._hop, self._consumer, self._epoch, batch):
                await self._apply(_Batch(batch, self._expected, reached))
        self._expected = reached
        self._applied.inc(len(batch))
        self._tell_lag(batch[-1].time_nanoseconds / 1e9)

    async def _apply(self, batch: _Batch) -> None:
        records = batch.records
        with self._stopping(f"records {records[0].seq} to {records[-1].seq} cannot be stored", batch):
            await fold_in(self._store, *batch, seconds=math.inf)

    @contextlib.contextmanager
    def _stopping(self, what: str, batch: _Batch | None = None) -> Iterator[None]:
        """Only an outage is waited for. Anything else that the store raises stops the partition, with the reason."""
        try:
            yield
        except (StepDown, BrokerError, StoreUnavailable, PartitionStopped) as error:
            if not isinstance(error, StoreBroken):
                raise
            self._failed = batch
            raise PartitionStopped(f"{self._name} of {self._stream}: {what}: {error}", error.remedy) from error
        except Exception as error:
            self._log.exception("fold_failed")
            self._failed = batch
            reason = f"{self._name} of {self._stream}: {what}: {type(error).__name__}"
            raise PartitionStopped(reason, StoreBroken().remedy) from error

    def _tell_lag(self, stored_at: float | None) -> None:
        """Set the lag. `stored_at`: when the oldest record that waits was stored, as Unix time; None: no record waits."""
        self._oldest_due_at, self._lag_set_at = stored_at, time.monotonic()
        self._lag.set(0.0 if stored_at is None else max(0.0, time.time() - stored_at))

    async def watch_lag(self, reader: PartitionReader) -> None:
        """Measure the lag while nothing is folded here; runs beside `reader`, ends by cancellation.

        It does so for a partition that stopped, stands by or has no owner, too: a fold that stands still must be noticed.
        """
        while True:
            end_if_cancelled()
            await asyncio.sleep(LAG_SECONDS)
            if time.monotonic() - self._lag_set_at < LAG_SECONDS:
                continue
            try:
                await self._measure_lag(reader.phase)
            except (SeamarkError, OSError, TimeoutError) as error:
                self._log.debug("lag_not_measured", error=type(error).__name__)
                if self._oldest_due_at is not None:
                    self._lag.set(max(0.0, time.time() - self._oldest_due_at))
            except Exception:
                # Without this task a fold that stands still looks healthy, so an unforeseen error must not end it.
                self._log.exception("lag_measuring_failed")

    async def _measure_lag(self, phase: Phase) -> None:
        at = self._expected
        if phase is Phase.STANDBY:
            at = await self._store.checkpoint()
        elif not self._looked:
            return  # the store has never answered: how far the fold has come is not known
        state = await self._broker.stream(self._stream)
        start = at.seq + 1 if at is not None and at.epoch == state.epoch else 1
        due = await self._broker.leader_next(self._stream, self._subject, start)
        if self._expected == at or phase is Phase.STANDBY:  # else a batch was folded meanwhile, and has set a newer lag
            self._tell_lag(datetime.fromisoformat(due.time).timestamp() if due is not None else None)

    async def tend(self, reader: PartitionReader) -> None:
        """What a projection has to do beside folding, for as long as `reader` runs; here nothing. Ends by cancellation."""

    async def pass_over(self, seq: int) -> None:
        """Does nothing: a log keeps records for a month and nearly always has some, so its checkpoint moves often enough."""


async def fold_in(
    store: Store,
    batch: list[Delivered],
    expected: Checkpoint | None,
    reached: Checkpoint,
    seconds: float = PATIENCE_SECONDS,
) -> None:
    """Fold a batch in. Where an outcome is unknown, the stored checkpoint tells.

    Raises:
        StepDown: somebody else has moved the checkpoint. StoreUnavailable: the store was away for longer than `seconds`.
    """
    left, doubt, refused = batch, False, False

    async def go_on() -> None:
        nonlocal left, expected, doubt, refused
        while left:
            if doubt:
                # Also when it was refused: a script whose answer was lost runs twice, and the first run has the second refused.
                stored = await store.checkpoint()
                rest = still_due(left, expected, stored, reached)
                if rest is None or (refused and stored == expected):
                    raise StepDown(f"the checkpoint was moved to {stored} by another process")
                expected, left, doubt = stored, rest, False
            else:
                doubt, refused = True, False
                if await store.apply(left, expected, reached):
                    return
                refused = True

    await patiently(go_on, seconds=seconds)


def still_due(
    batch: list[Delivered], expected: Checkpoint | None, stored: Checkpoint | None, reached: Checkpoint
) -> list[Delivered] | None:
    """What of a batch whose outcome is unknown is still to be applied, by the checkpoint that is stored now.

    A part of it may be stored: where a batch takes several scripts, each stores a checkpoint of its own. Whoever stored it, the
    rest goes on from there.

    Args:
        expected: the checkpoint the batch follows.
        reached: the checkpoint of all of it.

    Returns:
        None: the stored checkpoint is not on the way from `expected` to `reached`.
    """
    if stored == expected:
        return batch
    start = 0 if expected is None else expected.seq
    if stored is None or stored.epoch != reached.epoch or not start <= stored.seq <= reached.seq:
        return None
    return [message for message in batch if message.seq > stored.seq]
