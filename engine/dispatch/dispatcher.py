"""The dispatcher: turns events into records of their users' logs, each exactly once and in order.

A round takes consecutive events of an event partition `q`: check, claim, append. Foreign partitions are committed first and
the home partition `p = q` last, so that the home mark is the position of `q`: everything before it is applied everywhere.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from redis.asyncio import Redis

from engine import failpoints, metrics
from engine.broker.jetstream import Broker, StreamState
from engine.cancels import Cancels, watching
from engine.controls.watching import WatchedControls
from engine.dispatch.burials import Burials
from engine.dispatch.claims import Claim, Claims, ClaimsUnavailable
from engine.dispatch.relay import relaying
from engine.dispatch.rounds import Entry, Planned, Round, batches, fan_out, not_covered, rounds, withhold
from engine.dispatch.source import EVENTS, SOURCES, EventSource
from engine.dispatch.turns import Turns
from engine.errors import BrokerError, PartitionStopped, StepDown, TopologyError
from engine.limits import PIN_TIMEOUT_SECONDS
from engine.log.incarnations import (
    continues,
    epoch_of,
    inherited,
    is_younger,
    reaching,
    read_partitions,
    repair_of,
    stream_of,
    translated,
    younger,
)
from engine.log.marks import Mark, MarkedStream, PlacedMark
from engine.log.stalls import CLAIMS, Stall
from engine.log.writer import MarkedWriter, Ownership, read_mark
from engine.partition.head import read_pin_timeout
from engine.partition.reader import Delivered, PartitionReader
from engine.tasks import end_if_cancelled, run_until, together
from engine.topology import server as topology
from seamark.protocol.subjects import log_stream

_log = structlog.get_logger("seamark.dispatcher")

_APPENDED = metrics.dispatched_events.labels("appended")
_DUPLICATE = metrics.dispatched_events.labels("duplicate")
_DEAD = metrics.dispatched_events.labels("dead")

CLAIMS_RETRY_SECONDS = 1.0
EPOCH_WATCH_SECONDS = 5.0
PAUSED_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Streams:
    """EVENTS, and those LOGs that were needed so far, as a worker believes them to be.

    `recorded` are the epochs written down when they were made, `inherited` the earlier incarnations of EVENTS.
    """

    events: StreamState
    logs: dict[int, StreamState]
    recorded: dict[str, str]
    inherited: dict[str, int]


class Dispatcher:
    """All partitions of all sources in one process; each is worked on while this process holds its pin.

    Args:
        partitions: as the streams' metadata says; see `read_partitions`.
        sources: where events come from.
        cancels: which transactions are cancelled; None: none is.
        controls: while a source's lane is paused, nothing of it is dispatched.
    """

    def __init__(
        self,
        broker: Broker,
        claims: Claims,
        partitions: int,
        *,
        sources: Sequence[EventSource] = SOURCES,
        cancels: Cancels | None = None,
        controls: WatchedControls | None = None,
        pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS,
    ) -> None:
        self._broker = broker
        self._claims = claims
        self._streams = [*(source.stream for source in sources), *map(log_stream, range(partitions))]
        turns = Turns()
        self._workers = [
            DispatchWorker(broker, claims, q, partitions, source, turns, cancels, controls)
            for source in sources
            for q in range(partitions)
        ]
        self.readers = [
            PartitionReader(broker, worker.reads, worker, pin_timeout_seconds=pin_timeout_seconds)
            for worker in self._workers
        ]

    async def run(self) -> None:
        """Work until cancelled; the first partition to fail in a way nobody foresaw ends all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._claims.watch(), name="claims-watch")
                tasks.create_task(self._watch_epochs(), name="epoch-watch")
                for worker, reader in zip(self._workers, self.readers, strict=True):
                    tasks.create_task(reader.run(), name=f"dispatch {worker.name}")
                    tasks.create_task(worker.burials.tend(reader), name=f"bury {worker.name}")
        finally:
            await self._claims.close()

    async def _watch_epochs(self) -> None:
        """A stream restored or re-created under a running dispatcher: positions have to be read, and translated, anew."""
        while True:
            await asyncio.sleep(EPOCH_WATCH_SECONDS)
            noted = [worker.streams for worker in self._workers]
            # One that is missing or has no leader says nothing about the others.
            now: dict[str, str | None] = {}
            for name in self._streams:
                try:
                    now[name] = (await stream_of(self._broker, name)).epoch
                except PartitionStopped:
                    now[name] = None
                except BrokerError as error:
                    _log.debug("epoch_not_read", stream=name, error=type(error).__name__)
            for worker, reader, streams in zip(self._workers, self.readers, noted, strict=True):
                # Who has begun anew meanwhile may know more than was read here.
                if worker.streams is streams and worker.changed(now):
                    reader.take_over_again()


class DispatchWorker:
    """One event partition: its position, its ownership, its rounds. A `partition.Worker`."""

    def __init__(
        self,
        broker: Broker,
        claims: Claims,
        event_partition: int,
        partitions: int,
        source: EventSource = EVENTS,
        turns: Turns | None = None,
        cancels: Cancels | None = None,
        controls: WatchedControls | None = None,
    ) -> None:
        self._cancels = cancels
        self._broker = broker
        self._claims = claims
        self._q = event_partition
        self._partitions = partitions
        self._source = source
        self._turns = turns or Turns()
        self._controls = controls
        self.reads = source.partition(event_partition)
        self.name = f"{source.stream}-{event_partition}"
        self._ownership = Ownership(0, "", "")
        self.streams: Streams | None = None
        self._writers: dict[int, MarkedWriter] = {}
        self.burials = Burials(broker, event_partition, source)
        # Partitions whose LOG has stopped this event partition: it does not go on before they are mended.
        self._faulty: set[int] = set()

    # --- ownership ---------------------------------------------------------------------------------------------------

    async def acquire(self) -> int:
        """Take the home mark over with the next term; foreign marks are taken over when they are first needed."""
        self.streams, self._writers = await self._read_streams(), {}
        found, mark = await self._mark(self._q, self.streams)
        if mark and found.mark and mark.epoch != found.mark.epoch:
            _log.warning("source_restored", partition=self._q, dispatched=found.mark.seq, goes_on_after=mark.seq)
        term = await self._newest_term(found.mark, self.streams) + 1
        events = self.streams.events
        self._ownership = Ownership(term, secrets.token_hex(8), epoch_of(events))
        home = await self._take_over(self._q, found, mark, start_seq=max(0, events.first_seq - 1))
        self.burials.take_over(self._ownership.source_epoch, home.mark)
        failpoints.reach("after-take-over")
        return home.mark.next_seq

    async def position(self) -> int:
        """Where the home mark stands, checked but not taken over, and with it the marks that have stopped this partition."""
        streams = await self._read_streams()
        _, home = await self._mark(self._q, streams)
        for partition in sorted(self._faulty):
            await self._mark(partition, streams)
            self._faulty.discard(partition)
        return home.next_seq if home else max(1, streams.events.first_seq)

    async def _read_streams(self) -> Streams:
        events = await stream_of(self._broker, self._source.stream)
        try:
            recorded = (await topology.read_epochs(self._broker))[0] or {}
        except TopologyError as error:
            raise PartitionStopped(error.detail, error.remedy) from error
        if not continues(events, recorded.get(events.name)):
            raise PartitionStopped(
                f"{events.name} is another incarnation than the recorded one", repair_of(events.name, self._q)
            )
        return Streams(events, {}, recorded, inherited(events))

    def _marked(self, partition: int) -> MarkedStream:
        return self._source.marked(partition, self._q)

    async def _mark(self, partition: int, streams: Streams) -> tuple[PlacedMark, Mark | None]:
        """The mark of this event partition in a LOG: as it is stored, and what it says in the present incarnations."""
        if partition not in streams.logs:
            streams.logs[partition] = await stream_of(self._broker, log_stream(partition))
        found = await read_mark(self._broker, self._marked(partition))
        events = streams.events
        if found.mark is not None and found.mark.epoch == events.epoch:
            events = await reaching(self._broker, events, found.mark.seq)
        mark = translated(found, self._q, events, streams.logs[partition], streams.recorded)
        if mark and found.mark and await is_younger(self._broker, self._marked(partition), mark.seq):
            raise younger(self._q, events.name, found.mark, mark)
        return found, mark

    async def _newest_term(self, home: Mark | None, streams: Streams) -> int:
        """The last owner's term. A home mark from a backup may be older than the foreign marks, which would refuse its heir."""
        log = streams.logs[self._q]
        terms = [home.term if home else 0]
        if inherited(log) and (home is None or home.stream_epoch != log.epoch):
            for partition in range(self._partitions):
                found = await read_mark(self._broker, self._marked(partition))
                terms.append(found.mark.term if found.mark else 0)
        return max(terms)

    async def _take_over(self, partition: int, found: PlacedMark, mark: Mark | None, start_seq: int) -> MarkedWriter:
        assert self.streams is not None
        writer = self._writers[partition] = await MarkedWriter.take_over(
            self._broker,
            self._marked(partition),
            self._ownership,
            epoch=epoch_of(self.streams.logs[partition]),
            found=found,
            mark=mark,
            start_seq=start_seq,
        )
        return writer

    def changed(self, now: dict[str, str | None]) -> bool:
        """Whether one of the streams is another incarnation than when this worker began, or is missing.

        Args:
            now: epochs by stream, as far as they could be read; None for a stream that is missing.
        """
        if self.streams is None:
            return False
        known = self.streams.events, *self.streams.logs.values()
        return any(now.get(state.name, state.epoch) != state.epoch for state in known)

    def check(self, state: StreamState) -> None:
        """A stream re-created in between has the same names and numbers, for other events."""
        if self.changed({state.name: state.epoch}):
            raise StepDown(f"{state.name} changed its incarnation")

    # --- work --------------------------------------------------------------------------------------------------------

    async def handle(self, batch: list[Delivered]) -> None:
        """Append the records of a batch of events, round by round."""
        with self._turns.work(self._source):
            for round_ in rounds(batch, self._ownership.source_epoch):
                await self._until_resumed()
                await self._settle_round(round_)

    async def _until_resumed(self) -> None:
        """Wait while the lane is paused: the events stay where they are, and so does the position."""
        lane, watched = self._source.lane, self._controls
        while lane is not None and watched is not None and watched.controls.paused(lane):
            end_if_cancelled()
            await asyncio.sleep(PAUSED_LOOK_SECONDS)

    async def pass_over(self, seq: int) -> None:
        """Move the home mark to `seq`: no event is left up to there. It says from which event on dead letters are missing now."""
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
        await self._withhold(planned)
        entries = fan_out(planned, self._partitions)
        home = entries.pop(self._q, [])
        if entries:
            # Where one fails, positions are read anew before anything is tried again.
            works = {
                f"append {self.name} to {p}": self._append_to(p, each, round_.last_seq) for p, each in entries.items()
            }
            await together(works)
            failpoints.reach("between-foreign-and-home")
            await self._withhold(planned)
        await self._append(self._q, home, round_.last_seq)
        self._count(round_, planned, len(home) + sum(map(len, entries.values())))

    async def _withhold(self, planned: list[Planned]) -> None:
        """The last look before records are written: claims, or other partitions, may have taken long."""
        cancels = self._cancels
        if cancels is not None and any(p.accepted.event.transaction_id is not None for p in planned):
            await cancels.heard()
        withhold(planned, cancels.holds if cancels is not None else lambda *_: False, datetime.now(UTC))

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
            assert self.streams is not None
            found, mark = await self._mark(partition, self.streams)
            writer = await self._take_over(partition, found, mark, start_seq=home.next_seq - 1)
        due, turn = batches(not_covered(entries, writer.mark), partition, last_seq), self._turns.turn(self._source)
        batch = None
        while batch is None or batch.seq != last_seq or batch.user is not None:
            async with turn:
                if batch is not None:  # a page has many, and each may have waited long for its turn
                    await self._withhold(list({entry.seq: entry.planned for entry in entries}.values()))
                batch = next(due)
                if batch.messages or partition == self._q:
                    unburied = self.burials.first if partition == self._q else None
                    await writer.append(batch.messages, batch.seq, batch.user, unburied=unburied)

    async def _claim_events(self, planned: list[Planned]) -> list[Planned]:
        """Those that were not published before. Where Redis is away, what must not repeat waits and the rest goes on."""
        if not planned:
            return planned
        claims = [self._claim(event) for event in planned]
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

    def _claim(self, event: Planned) -> Claim:
        shared = self.streams.inherited if self.streams else {}
        former = tuple(f"{epoch}.{event.seq}" for epoch, last in shared.items() if event.seq <= last)
        position = f"{self._ownership.source_epoch}.{event.seq}"
        return Claim(event.accepted.at.tenant_token, event.accepted.event.id, position, former)

    def _count(self, round_: Round, planned: list[Planned], records: int) -> None:
        _APPENDED.inc(len(planned))
        _DUPLICATE.inc(len(round_.planned) - len(planned))
        _DEAD.inc(len(round_.dead))
        metrics.dispatched_records.inc(records)
        metrics.dispatch_delay_seconds.observe(max(0.0, time.time() - round_.oldest_nanoseconds / 1e9))


async def run(
    broker: Broker,
    redis: Redis,
    *,
    partitions: int | None = None,
    controls: WatchedControls | None = None,
    stop: asyncio.Event,
) -> None:
    """Dispatch until `stop` is set; a batch that is in flight then is settled by whoever reads its mark next.

    Raises:
        TopologyError: see `read_partitions`.
    """
    count = await read_partitions(broker, partitions)
    pin_timeout = await read_pin_timeout(broker, EVENTS.partition(0))
    async with relaying(broker.settings, count), watching(broker) as cancels:
        work = Dispatcher(
            broker, Claims(redis), count, cancels=cancels, controls=controls, pin_timeout_seconds=pin_timeout
        )
        await run_until(stop, work.run(), name="dispatcher")
