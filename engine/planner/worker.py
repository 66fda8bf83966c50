"""One log's planner: reads records in order, decides, writes down what it has decided, and then moves its mark in JOBS.

The receipts of a round are stored before the mark moves. So a planner that dies in between has its round planned again, by one
with a higher term: whatever both have written down, the plan of the highest term counts, and only the highest term can commit.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import structlog

from engine import failpoints, metrics
from engine.broker.jetstream import Broker, Outgoing, StreamState
from engine.broker.refusals import is_final
from engine.cancels import Cancels
from engine.errors import ApiError, BrokerError, PartitionStopped, StepDown, StoreBroken, StoreUnavailable, Unavailable
from engine.jobs.messages import decode_job
from engine.limits import PLAN_MARK_SECONDS, PLAN_ROUND
from engine.log.incarnations import ASK_AGAIN_SECONDS, epoch_of, stream_of
from engine.log.marks import Mark, PlacedMark
from engine.log.stalls import Stall
from engine.log.writer import MarkedWriter, Ownership, read_mark
from engine.partition.reader import Delivered, PartitionReader, Phase
from engine.patience import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, passes, patiently
from engine.planner import position
from engine.planner.deciding import Decider, Drops, Planned, Profiles, Rules
from engine.planner.jobs import Following, batches, messages_of
from engine.planner.letters import OVER_SHARE, REFUSED, bury, end_receipts
from engine.planner.plans import Found, notifications_in
from engine.planner.shares import Shares
from engine.planner.witness import Witness, Witnesses
from engine.tasks import end_if_cancelled
from engine.traces import names
from engine.traces.lines import about_followed
from engine.traces.messages import jobs_stored, receipts_stored, working
from engine.traces.spans import active
from seamark.backoff import Backoff
from seamark.protocol.subjects import JOBS_STREAM, RECEIPTS_STREAM

_log = structlog.get_logger("seamark.planner")

T = TypeVar("T")

DOUBT: Final = timedelta(minutes=1)
"""An earlier owner has read nothing that was stored so long after it was followed; clocks differ by less. Where the log ended by
then nobody can say for sure: a leader that was deposed shows the past."""

_FAULT: Final = "Mend what it names, or report it as a fault of Seamark. Then the partition goes on by itself"

_PLANNED, _PASSED = map(metrics.planner_records.labels, ("planned", "passed"))


class PlanWorker:
    """The planner of one log. A `partition.Worker`.

    Args:
        rules, profiles, drops, cancels, shares: what a `Decider` decides from.
    """

    def __init__(
        self,
        broker: Broker,
        partition: int,
        rules: Rules,
        profiles: Profiles,
        drops: Drops,
        witnesses: Witnesses,
        cancels: Cancels | None = None,
        shares: Shares | None = None,
    ) -> None:
        self._broker = broker
        self._p = partition
        self._marked = position.marked(partition)
        self._decider, self._witnesses = Decider(rules, profiles, drops, cancels, shares), witnesses
        self._spans = active()
        self._writer: MarkedWriter | None = None
        self._log_state: StreamState | None = None
        # What is decided up to here; the mark may lag behind it where nothing was to be written down.
        self._passed = 0
        self._marked_at = 0.0
        # Records that an earlier owner may have written plans for: so many behind its mark, of those stored until then.
        self._doubtful, self._doubtful_until = 0, datetime.now(UTC)
        # The round that has stopped this partition.
        self._unplanned: Sequence[Delivered] = ()
        # A round moves the mark, and so does `tend`: one at a time.
        self._moving = asyncio.Lock()

    # --- where it stands ---------------------------------------------------------------------------------------------

    async def acquire(self) -> int:
        """Take the mark over with the next term. Needs PostgreSQL, which says whether JOBS is the one it was."""
        async with self._moving:
            found, mark, log, witness = await self._look()
            self._writer, self._log_state = None, log
            jobs = await stream_of(self._broker, JOBS_STREAM)
            ownership = Ownership((found.mark or mark).term + 1, secrets.token_hex(8), epoch_of(log))
            self._writer = await MarkedWriter.take_over(
                self._broker, self._marked, ownership, epoch=epoch_of(jobs), found=found, mark=mark, start_seq=mark.seq
            )
            self._passed, self._marked_at = mark.seq, time.monotonic()
            self._doubtful, self._doubtful_until = PLAN_ROUND, datetime.now(UTC) + DOUBT
            await self._ask_store(self._witnesses.begin(self._p, Witness(epoch_of(log), mark.seq), witness))
            failpoints.reach("after-take-over")
            return mark.next_seq

    async def position(self) -> int:
        """Where the mark stands, checked but not taken over; and what has stopped this partition can be planned now."""
        mark = (await self._look())[1]
        if self._unplanned:
            await self._decide(self._unplanned)
        return mark.next_seq

    async def _look(self) -> tuple[PlacedMark, Mark, StreamState, Witness | None]:
        """The mark as it is stored, what it says now, the log, and what its witness says.

        Raises:
            PartitionStopped: the mark cannot be trusted. Unavailable: nobody can tell now.
        """
        found, pauses = await read_mark(self._broker, self._marked), iter(ASK_AGAIN_SECONDS)
        # Asked after the mark was read: else JOBS could be put back in between, to before what the witness is told meanwhile.
        witness = await self._ask_store(self._witnesses.of(self._p))
        while True:
            log = await stream_of(self._broker, self._marked.source)
            jobs = await stream_of(self._broker, JOBS_STREAM)
            mark = await position.read_meant(self._broker, self._p, found, log, jobs)
            seen = None if witness is None else witness.in_log(log)
            if seen is None or seen <= mark.seq:
                return found, mark, log, witness
            pause = next(pauses, None)
            if pause is None:
                detail = f"the mark for {log.name} is at {mark.seq}, and its witness has seen it at {seen}"
                raise PartitionStopped(f"JOBS was put back: {detail}", position.ANEW)
            await asyncio.sleep(pause)  # a leader that was deposed shows the past
            found = await read_mark(self._broker, self._marked)

    async def _ask_store(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except StoreBroken as error:
            raise PartitionStopped(
                f"the witness of {self._marked.subject} cannot be used: {error}", error.remedy
            ) from error
        except StoreUnavailable as error:
            raise Unavailable(str(error)) from error

    def check(self, state: StreamState) -> None:
        """A log that was made anew, or restored, has the same name, and other records."""
        if self._log_state is not None and state.epoch != self._log_state.epoch:
            raise StepDown(f"{state.name} changed its incarnation")

    async def pass_over(self, seq: int) -> None:
        """Move the mark past what other partitions have added: a mark that lags far behind could be trimmed past."""
        async with self._moving:
            self._passed = max(self._passed, seq)
            await self._move()

    @property
    def reached(self) -> Witness | None:
        """How far the log is planned by this owner's last mark; None: it owns none."""
        return None if self._writer is None else Witness(self._writer.mark.epoch, self._writer.mark.seq)

    # --- work --------------------------------------------------------------------------------------------------------

    async def handle(self, batch: list[Delivered]) -> None:
        """Decide about a batch of records, round by round."""
        for start in range(0, len(batch), PLAN_ROUND):
            round_ = batch[start : start + PLAN_ROUND]
            async with self._moving:
                if self._spans is None or self._log_state is None:
                    await self._settle_round(round_)
                else:
                    source = position.source(self._p)
                    with working(self._spans, names.PLAN, source.consumer, epoch_of(self._log_state), round_):
                        await self._settle_round(round_)

    async def _settle_round(self, round_: Sequence[Delivered]) -> None:
        receipts, following, throttled = await self._decide(round_)
        if receipts:
            # Whoever takes over reckons with plans that were written down for one round behind the mark, not for more.
            await self._move()
            failpoints.reach("before-receipts")
            await self._store(receipts)
            await bury(self._broker, throttled, OVER_SHARE)
            failpoints.reach("between-receipts-and-mark")
        cut = list(batches(following))
        for batch in cut:
            await self._hand_out(batch, round_[-1].seq if batch is cut[-1] else batch[-1].seq)
        self._passed = round_[-1].seq
        self._doubtful -= len(round_)
        if receipts or time.monotonic() - self._marked_at >= PLAN_MARK_SECONDS:
            await self._move()
        _PLANNED.inc(len(receipts))
        _PASSED.inc(len(round_) - len(receipts))

    async def _hand_out(self, batch: Sequence[Following], reached: int) -> None:
        """Store jobs together with the mark behind the records that they follow from.

        Jobs that JOBS takes never must not hold up the others: they are found by halving.
        """
        since = time.time_ns()
        try:
            self._passed = reached
            await self._move(messages_of(batch))
            if self._spans is not None:
                jobs_stored(self._spans, [(one.trace, one.stored_at, one.messages) for one in batch], since)
        except ApiError:
            if len(batch) == 1:
                with about_followed(batch[0].trace):
                    return await self._give_up(batch[0], reached)
            half = len(batch) // 2
            await self._hand_out(batch[:half], batch[half - 1].seq)
            await self._hand_out(batch[half:], reached)

    async def _give_up(self, one: Following, reached: int) -> None:
        """End the jobs of one record if JOBS can never take them; while it takes no mark either, it does not refuse them.

        Only of the first message of a batch the server says what is wrong with it, so each of them is the first in turn.
        """
        assert self._writer is not None
        messages = messages_of([one])
        for turn in itertools.count():
            end_if_cancelled()
            await self._writer.append([], self._writer.mark.seq)
            first = turn % len(messages)
            try:
                await self._move(messages[first:] + messages[:first])
                return
            except ApiError as error:
                if is_final(error):
                    _log.error("jobs_refused", stream=self._marked.source, seq=one.seq, code=error.err_code)
                    break
            if first == len(messages) - 1:
                await asyncio.sleep(PAUSE_SECONDS_MAX)
        jobs, now = [decode_job(message.payload) for message in one.messages], datetime.now(UTC)
        await self._store([message for job in jobs for message in end_receipts(job, REFUSED, self._p, now)])
        await bury(self._broker, jobs, REFUSED)
        self._passed = reached

    async def _move(self, jobs: Sequence[Outgoing] = ()) -> None:
        """Store the mark, and what follows from the round together with it or not at all."""
        assert self._writer is not None
        if jobs or self._passed > self._writer.mark.seq:
            await self._writer.append(list(jobs), self._passed, refusable=True)
            self._marked_at = time.monotonic()

    async def _decide(self, round_: Sequence[Delivered]) -> Planned:
        """What is decided of a round. While what decisions are made from cannot be read, it waits.

        Raises:
            PartitionStopped: there is a fault. To pass over the records would lose what they were to send.
        """
        try:
            found = list(notifications_in(round_))
            doubted = self._doubted if self._doubtful > 0 else None
            planned = await patiently(self._decider.planned, found, self._term, doubted, seconds=math.inf)
        except Exception as error:
            self._unplanned = round_
            _log.exception("records_not_planned", stream=self._marked.source)
            why, remedy = (
                (str(error), error.remedy) if isinstance(error, StoreBroken) else (type(error).__name__, _FAULT)
            )
            seqs = f"records {round_[0].seq} to {round_[-1].seq} of {self._marked.source}"
            raise PartitionStopped(f"{seqs} cannot be planned: {why}", remedy) from error
        self._unplanned = ()
        return planned

    def _doubted(self, one: Found) -> bool:
        """Whether it is old enough that an earlier owner may have written a plan for it, as long as there is doubt about any."""
        return one.stored_at <= self._doubtful_until

    @property
    def _term(self) -> int:
        return 0 if self._writer is None else self._writer.mark.term

    async def _store(self, receipts: list[Outgoing]) -> None:
        """Store receipts, whatever it takes. Stored twice they say the same.

        Raises:
            PartitionStopped: the broker refuses them for good.
        """
        stall = Stall(RECEIPTS_STREAM, "planner_waits")
        backoff, since = Backoff(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX, jitter=0.5), time.time_ns()
        try:
            while True:
                end_if_cancelled()
                try:
                    await self._broker.commit(receipts)
                    if self._spans is not None:
                        receipts_stored(self._spans, receipts, since)
                    return
                except BrokerError as error:
                    if not passes(error):
                        raise PartitionStopped(f"RECEIPTS refuses what was planned: {error}", _FAULT) from error
                    metrics.append_retries.labels("receipts").inc()
                    stall.report(error)
                await asyncio.sleep(backoff.next_seconds())
        finally:
            stall.over()

    async def tend(self, reader: PartitionReader) -> None:
        """Move the mark behind the last records, for as long as `reader` runs; ends by cancellation."""
        while True:
            await asyncio.sleep(PLAN_MARK_SECONDS)
            end_if_cancelled()
            waits = self._moving.locked() or time.monotonic() - self._marked_at < PLAN_MARK_SECONDS
            if reader.phase is not Phase.READING or waits or self._writer is None:
                continue
            try:
                async with self._moving:
                    await self._move()
            except StepDown as error:
                _log.info("mark_not_moved", partition=self._p, why=str(error))  # the next round steps down
            except (BrokerError, PartitionStopped):
                reader.take_over_again()
            except Exception:
                # Without this task a mark would lag for ever, so an unforeseen error must not end it.
                _log.exception("mark_not_moved", partition=self._p)
