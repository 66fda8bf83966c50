"""The dispatcher: turns events into records of their users' logs, each exactly once and in order.

A round takes consecutive events of an event partition `q`: check, claim, append. Foreign partitions are committed first and
the home partition `p = q` last, so that the home mark is the position of `q`: everything before it is applied everywhere.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence

import structlog
from redis.asyncio import Redis

from engine import failpoints, metrics
from engine.broker.jetstream import Broker, StreamState
from engine.dispatch.burials import Burials
from engine.dispatch.claims import Claim, Claims, ClaimsUnavailable
from engine.dispatch.rounds import Entry, Planned, Round, batches, fan_out, not_covered, rounds
from engine.dispatch.source import EVENTS, EventSource
from engine.errors import BrokerError, PartitionStopped, TopologyError
from engine.limits import PIN_TIMEOUT_SECONDS
from engine.log.incarnations import check_reach, epoch_of, missing, read_partitions, stream_of
from engine.log.marks import MarkedStream, PlacedMark
from engine.log.stalls import CLAIMS, Stall
from engine.log.writer import REPAIR, Epochs, MarkedWriter, Ownership, check_mark, read_mark
from engine.partition.head import read_pin_timeout
from engine.partition.reader import Delivered, PartitionReader
from engine.tasks import end, end_if_cancelled, run_until
from engine.topology import server as topology
from seamark.protocol.subjects import log_stream

_log = structlog.get_logger("seamark.dispatcher")

_APPENDED = metrics.dispatched_events.labels("appended")
_DUPLICATE = metrics.dispatched_events.labels("duplicate")
_DEAD = metrics.dispatched_events.labels("dead")

CLAIMS_RETRY_SECONDS = 1.0
EPOCH_WATCH_SECONDS = 5.0
GONE = ""
"""In place of the epoch of a stream that is not there."""


class Dispatcher:
    """All partitions of a source in one process; each is worked on while this process holds its pin.

    Args:
        partitions: as the streams' metadata says; see `read_partitions`.
        source: where the events come from.
    """

    def __init__(
        self,
        broker: Broker,
        claims: Claims,
        partitions: int,
        *,
        source: EventSource = EVENTS,
        pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS,
    ) -> None:
        self._broker = broker
        self._claims = claims
        self._source = source
        self._workers = [DispatchWorker(broker, claims, q, partitions, source) for q in range(partitions)]
        self.readers = [
            PartitionReader(broker, source.partition(q), worker, pin_timeout_seconds=pin_timeout_seconds)
            for q, worker in enumerate(self._workers)
        ]

    async def run(self) -> None:
        """Work until cancelled; the first partition to fail in a way nobody foresaw ends all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._claims.watch(), name="claims-watch")
                tasks.create_task(self._watch_epochs(), name="epoch-watch")
                for q, (worker, reader) in enumerate(zip(self._workers, self.readers, strict=True)):
                    tasks.create_task(reader.run(), name=f"dispatch-{q}")
                    tasks.create_task(worker.burials.tend(reader), name=f"bury-{q}")
        finally:
            await self._claims.close()

    async def _watch_epochs(self) -> None:
        """A stream restored or re-created under a running dispatcher: its positions mean nothing any more."""
        names = [self._source.stream, *(log_stream(p) for p in range(len(self._workers)))]
        while True:
            await asyncio.sleep(EPOCH_WATCH_SECONDS)
            noted = [worker.epochs for worker in self._workers]
            # One that is missing or has no leader says nothing about the others.
            actual: dict[str, str | None] = {}
            for name in names:
                try:
                    actual[name] = (await stream_of(self._broker, name)).epoch
                except PartitionStopped:
                    actual[name] = GONE
                except BrokerError as error:
                    _log.debug("epoch_not_read", stream=name, error=type(error).__name__)
            for worker, reader, epochs in zip(self._workers, self.readers, noted, strict=True):
                # Who has begun anew meanwhile may know more than was read here.
                if worker.epochs is epochs and worker.changed(actual):
                    reader.suspect()


class DispatchWorker:
    """One event partition: its position, its ownership, its rounds. A `partition.Worker`."""

    def __init__(
        self, broker: Broker, claims: Claims, event_partition: int, partitions: int, source: EventSource = EVENTS
    ) -> None:
        self._broker = broker
        self._claims = claims
        self._q = event_partition
        self._partitions = partitions
        self._source = source
        self._ownership = Ownership(0, "")
        self.epochs = Epochs({}, {})
        self._writers: dict[int, MarkedWriter] = {}
        self._changed: PartitionStopped | None = None
        self.burials = Burials(broker, event_partition, source)
        # Partitions whose LOG has stopped this event partition: it does not go on before they are mended.
        self._faulty: set[int] = set()

    # --- ownership ---------------------------------------------------------------------------------------------------

    async def acquire(self) -> int:
        """Claim the home mark with the next term; foreign marks are claimed when they are first needed."""
        events, self.epochs = await self._read_epochs()
        self._changed = None
        self._writers = {}
        found = await self._read_mark(self._q)
        await check_reach(self._broker, self._marked(self._q), events, found.mark)
        self._ownership = Ownership((found.mark.term if found.mark else 0) + 1, secrets.token_hex(8))
        home = await self._claim_writer(self._q, start_seq=max(0, events.first_seq - 1))
        self.burials.take_over(self._events_epoch, home.mark)
        failpoints.reach("after-take-over")
        return home.mark.next_seq

    async def position(self) -> int:
        """Where the home mark stands, checked but not claimed, and with it the marks that have stopped this partition."""
        events, epochs = await self._read_epochs()
        found = await self._read_mark(self._q)
        check_mark(self._marked(self._q), found, epochs)
        await check_reach(self._broker, self._marked(self._q), events, found.mark)
        for partition in sorted(self._faulty):
            await self._know_epoch(partition, epochs)
            check_mark(self._marked(partition), await self._read_mark(partition), epochs)
            self._faulty.discard(partition)
        return found.mark.next_seq if found.mark else max(1, events.first_seq)

    def _marked(self, partition: int) -> MarkedStream:
        return self._source.marked(partition, self._q)

    async def _read_mark(self, partition: int) -> PlacedMark:
        return await read_mark(self._broker, self._marked(partition))

    @property
    def _events_epoch(self) -> str:
        return self.epochs.actual[self._source.stream]

    async def _read_epochs(self) -> tuple[StreamState, Epochs]:
        source = self._source.stream
        events = await stream_of(self._broker, source)
        try:
            recorded, _ = await topology.read_epochs(self._broker)
        except TopologyError as error:
            raise PartitionStopped(error.detail, error.remedy) from error
        if not recorded or recorded.get(source) != events.epoch:
            raise PartitionStopped(f"{source} is another incarnation than the recorded one", REPAIR)
        epochs = Epochs({source: epoch_of(events)}, recorded)
        await self._know_epoch(self._q, epochs)
        return events, epochs

    async def _know_epoch(self, partition: int, epochs: Epochs) -> None:
        stream = log_stream(partition)
        if stream not in epochs.actual:
            epochs.actual[stream] = epoch_of(await stream_of(self._broker, stream))

    async def _claim_writer(self, partition: int, start_seq: int) -> MarkedWriter:
        await self._know_epoch(partition, self.epochs)
        found, marked = await self._read_mark(partition), self._marked(partition)
        writer = await MarkedWriter.claim(
            self._broker, marked, self._ownership, self.epochs, found=found, start_seq=start_seq
        )
        self._writers[partition] = writer
        return writer

    def changed(self, actual: Mapping[str, str | None]) -> bool:
        """Is one of these incarnations not the one this worker began with? Then it stops at its next round.

        Args:
            actual: epochs by stream, as far as they could be read; `GONE` for a stream that is missing.
        """
        for name, epoch in self.epochs.actual.items():
            if (now := actual.get(name, epoch)) != epoch:
                self._faulty.update(p for p in range(self._partitions) if log_stream(p) == name)
                self._changed = (
                    missing(name) if now == GONE else PartitionStopped(f"{name} changed its incarnation", REPAIR)
                )
        return self._changed is not None

    def check(self, state: StreamState) -> None:
        """A stream re-created in between has the same names and numbers, for other events."""
        self.changed({state.name: state.epoch})
        self._check_changed()

    def _check_changed(self) -> None:
        if self._changed:
            raise self._changed

    # --- work --------------------------------------------------------------------------------------------------------

    async def handle(self, batch: list[Delivered]) -> None:
        """Append the records of a batch of events, round by round."""
        for round_ in rounds(batch, self._events_epoch):
            self._check_changed()
            await self._settle_round(round_)

    async def pass_over(self, seq: int) -> None:
        """Move the home mark to `seq`: up to there no event is left. Say in it from which event on letters are missing now."""
        self._check_changed()
        home, unburied = self._writers[self._q], self.burials.first
        if seq > home.mark.seq:
            await home.append([], seq, unburied=unburied)
        elif unburied != home.mark.unburied:
            await home.append([], home.mark.seq, home.mark.user, unburied=unburied)

    async def _settle_round(self, round_: Round) -> None:
        for dead in round_.dead:
            await self.burials.bury(dead)
            _log.warning("event_dead", reason=dead.reason, original=dead.delivered.seq, partition=self._q)
            failpoints.reach("after-dead-letter")
        planned = await self._claim_events(round_.planned)
        failpoints.reach("after-claims-before-append")
        entries = fan_out(planned, self._partitions)
        home = entries.pop(self._q, [])
        if entries:
            await self._append_foreign(entries, round_.last_seq)
            failpoints.reach("between-foreign-and-home")
        await self._append(self._q, home, round_.last_seq)
        self._count(round_, planned, len(home) + sum(map(len, entries.values())))

    async def _append_foreign(self, entries: dict[int, list[Entry]], last_seq: int) -> None:
        """All at once; the first failure ends the others, and positions are read anew before anything is tried again."""
        # No TaskGroup: one that is cancelled while a task of it fails raises the failure alone, and the end would be missed.
        tasks = [
            asyncio.create_task(self._append_to(partition, foreign, last_seq), name=f"append {self._q}-{partition}")
            for partition, foreign in entries.items()
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await end(*tasks)
        for task in done:
            await task

    async def _append_to(self, partition: int, entries: list[Entry], last_seq: int) -> None:
        try:
            await self._append(partition, entries, last_seq)
        except PartitionStopped:
            self._faulty.add(partition)
            raise

    async def _append(self, partition: int, entries: Sequence[Entry], last_seq: int) -> None:
        writer = self._writers.get(partition)
        if writer is None:
            home = self._writers[self._q].mark
            writer = await self._claim_writer(partition, start_seq=home.next_seq - 1)
        for batch in batches(not_covered(entries, writer.mark), partition, last_seq):
            if batch.messages or partition == self._q:
                unburied = self.burials.first if partition == self._q else None
                await writer.append(batch.messages, batch.seq, batch.user, unburied=unburied)

    async def _claim_events(self, planned: list[Planned]) -> list[Planned]:
        """Those that were not published before. Where Redis is away, what must not repeat waits and the rest goes on."""
        if not planned:
            return planned
        epoch = self._events_epoch
        claims = [Claim(p.accepted.at.tenant_token, p.accepted.event.id, f"{epoch}.{p.seq}") for p in planned]
        patient = any(p.accepted.event.semantics == "effectively_once" for p in planned)
        stall = Stall(CLAIMS, "partition_waits_for_claims")  # as it has `effectively_once` events
        try:
            while True:
                try:
                    ours = await self._claims.take(claims)
                except ClaimsUnavailable as error:
                    if not patient:
                        self._claims.owe(claims)
                        return planned
                    stall.report(error)
                    end_if_cancelled()
                    await asyncio.sleep(CLAIMS_RETRY_SECONDS)
                else:
                    return [event for event, mine in zip(planned, ours, strict=True) if mine]
        finally:
            stall.over()

    def _count(self, round_: Round, planned: list[Planned], records: int) -> None:
        _APPENDED.inc(len(planned))
        _DUPLICATE.inc(len(round_.planned) - len(planned))
        _DEAD.inc(len(round_.dead))
        metrics.dispatched_records.inc(records)
        metrics.dispatch_delay_seconds.observe(max(0.0, time.time() - round_.oldest_nanoseconds / 1e9))


async def run(broker: Broker, redis: Redis, *, partitions: int | None = None, stop: asyncio.Event) -> None:
    """Dispatch until `stop` is set; a batch that is in flight then is settled by whoever reads its mark next.

    Raises:
        TopologyError: see `read_partitions`.
    """
    count = await read_partitions(broker, partitions)
    pin_timeout = await read_pin_timeout(broker, EVENTS.partition(0))
    work = Dispatcher(broker, Claims(redis), count, pin_timeout_seconds=pin_timeout)
    await run_until(stop, work.run(), name="dispatcher")
