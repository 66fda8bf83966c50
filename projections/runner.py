"""Runner glue: a projection as the worker of a partition reader.

The checkpoint is stored in the transaction of the effect, and applied only if it is the one this projector expects. So an
older projector that wakes up changes nothing, and a batch whose outcome is unknown is settled by reading the checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from engine import metrics
from engine.broker.jetstream import Broker, StreamState
from engine.errors import PartitionStopped, StepDown
from engine.log.incarnations import CLOCKS, epoch_of, reaching, stream_of
from engine.partition.reader import Delivered, PartitionReader, Phase
from engine.tasks import end_if_cancelled
from projections.store import Checkpoint, StoppingStore, Store, StoreUnavailable
from seamark.backoff import Backoff
from seamark.protocol.errors import SeamarkError

_log = structlog.get_logger("seamark.projection")

RETRY_SECONDS_MIN = 0.05
RETRY_SECONDS_MAX = 2.0
LAG_SECONDS = 5.0
"""How often the lag of a partition is measured while nothing is folded in it: two questions to the broker."""


@dataclass(frozen=True, slots=True)
class _Short:
    """A log was seen to end before a checkpoint: when for the first time, and whether a later look has seen it, too."""

    checkpoint: Checkpoint
    at: datetime
    confirmed: bool


class ProjectionWorker:
    """One projection of one stream partition. A `partition.Worker`.

    Args:
        name: of the projection, for logs, metrics and the remedy.
        stream: what is folded.
        store: where effect and checkpoint are.
        subject: what of the stream is folded, and what its lag is measured by.
    """

    def __init__(self, broker: Broker, name: str, stream: str, store: Store, subject: str = ">") -> None:
        self._broker = broker
        self._name = name
        self._stream = stream
        self._subject = subject
        self._store = StoppingStore(store, name, stream)
        self._expected: Checkpoint | None = None
        self._short: _Short | None = None
        self._epoch = ""
        self._log = _log.bind(projection=name, stream=stream)
        self._lag = metrics.projection_lag.labels(name, stream, subject)
        self._lag_set_at = 0.0
        self._looked = False
        self._oldest_due_at: float | None = None
        self._applied = metrics.projection_applied.labels(name, stream)

    async def acquire(self) -> int:
        """Read the checkpoint; nothing is claimed, for only a projector with the right checkpoint changes anything."""
        next_seq, self._expected, self._epoch = await self._look()
        return next_seq

    async def position(self) -> int:
        """The sequence to read next."""
        return (await self._look())[0]

    async def _look(self) -> tuple[int, Checkpoint | None, str]:
        checkpoint = await self._stored()
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
        left, backoff = batch, _backoff()
        while left:
            refused = False
            try:
                if await self._store.apply(left, self._expected, reached):
                    break
                refused = True
            except StoreUnavailable as error:
                self._log.warning("store_unavailable", why=str(error))
                end_if_cancelled()
                await asyncio.sleep(backoff.next_seconds())
            # Also when it was refused: a script whose answer was lost runs twice, and the first run has the second one refused.
            stored = await self._stored()
            rest = still_due(left, self._expected, stored, reached)
            if rest is None or (refused and stored == self._expected):
                raise StepDown(f"{self._name} of {self._stream} was moved to {stored} by another projector")
            self._expected, left = stored, rest
        self._expected = reached
        self._applied.inc(len(batch))
        self._tell_lag(batch[-1].time_nanoseconds / 1e9)

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
                self._log.debug("could not measure the lag", error=type(error).__name__)
                if self._oldest_due_at is not None:
                    self._lag.set(max(0.0, time.time() - self._oldest_due_at))
            except Exception:
                # Without this task a fold that stands still looks healthy, so an unforeseen error must not end it.
                self._log.exception("measuring the lag failed and is tried again")

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

    async def _stored(self) -> Checkpoint | None:
        """The checkpoint, however long the store is away: without it nothing can be said."""
        backoff = _backoff()
        while True:
            try:
                return await self._store.checkpoint()
            except StoreUnavailable as error:
                self._log.warning("store_unavailable", why=str(error))
            end_if_cancelled()
            await asyncio.sleep(backoff.next_seconds())


def _backoff() -> Backoff:
    return Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX, jitter=0.5)


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
