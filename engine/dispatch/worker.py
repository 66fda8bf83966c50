"""One event partition of a source: its position, its ownership, its rounds.

A round takes consecutive events of an event partition `q`: check, claim, append. Foreign partitions are committed first and
the home partition `p = q` last, so that the home mark is the position of `q`: everything before it is applied everywhere.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from engine import failpoints, metrics
from engine.broker.jetstream import Broker, StreamState
from engine.cancels import Cancels
from engine.controls.watching import WatchedControls
from engine.dispatch.burials import Burials, store_letter
from engine.dispatch.claims import Claim, Claims, ClaimsUnavailable
from engine.dispatch.clock import BrokerClock
from engine.dispatch.following import trace_in
from engine.dispatch.later import PutOff, put_off, with_schedules
from engine.dispatch.room import Shares, without_room
from engine.dispatch.rounds import (
    Dead,
    End,
    Entries,
    Entry,
    Planned,
    Round,
    batches,
    fan_out_by_steps,
    not_covered,
    rounds_by_steps,
)
from engine.dispatch.source import EVENTS, LATER, LATER_PLACE, EventSource, Place, stream_at
from engine.dispatch.spans import RoundSpans, followed_dead, traced
from engine.dispatch.turns import Turns
from engine.dispatch.withholding import Withholding
from engine.errors import PartitionStopped, StepDown, TopologyError
from engine.limits import LETTER_SECONDS
from engine.log.incarnations import (
    continues,
    epoch_of,
    inherited,
    is_younger,
    reaching,
    repair_of,
    stream_of,
    translated,
    younger,
)
from engine.log.marks import Mark, MarkedStream, PlacedMark
from engine.log.stalls import CLAIMS, Stall
from engine.log.writer import NONE_MISSING, MarkedWriter, Ownership, read_mark
from engine.partition.worker import Delivered
from engine.tasks import end_if_cancelled, together
from engine.topology import server as topology
from engine.traces.lines import about, about_followed
from engine.traces.spans import active

_log = structlog.get_logger("seamark.dispatcher")

_COUNTERS = [metrics.dispatched_events.labels(became) for became in ("appended", "put_off", "duplicate", "dead")]

CLAIMS_RETRY_SECONDS = 1.0
PAUSED_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Streams:
    """The source, and those places that were needed so far, as a worker believes them to be.

    `recorded` are the epochs written down when they were made, `inherited` the earlier incarnations of the source.
    """

    events: StreamState
    places: dict[Place, StreamState]
    recorded: dict[str, str]
    inherited: dict[str, int]


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
        shares: Shares | None = None,
    ) -> None:
        self._cancels = cancels
        self._shares = shares
        self._broker = broker
        self._claims = claims
        self._q = event_partition
        self._partitions = partitions
        self._source = source
        self._turns = turns or Turns()
        self._controls = controls
        self._spans = active()
        self._followed: RoundSpans | None = None  # of the round under way
        self.reads = source.partition(event_partition)
        self.name = f"{source.stream}-{event_partition}"
        self._ownership = Ownership(0, "", "")
        self.streams: Streams | None = None
        self._writers: dict[Place, MarkedWriter] = {}
        self._clock = BrokerClock(broker)
        self.burials = Burials(broker, event_partition, source)
        # Places that have stopped this event partition: it does not go on before they are mended.
        self._faulty: set[Place] = set()

    # --- ownership ---------------------------------------------------------------------------------------------------

    async def acquire(self) -> int:
        """Take the home mark over with the next term; foreign marks are taken over when they are first needed."""
        self.streams, self._writers = await self._read_streams(), {}
        found, mark = await self._mark(self._q, self.streams)
        if mark and found.mark and mark.epoch != found.mark.epoch:
            dispatched = found.mark.seq
            _log.warning("source_restored", partition=self._q, dispatched=dispatched, goes_on_after=mark.seq)
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
        for place in sorted(self._faulty, key=str):
            await self._mark(place, streams)
            self._faulty.discard(place)
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

    def _marked(self, place: Place) -> MarkedStream:
        return self._source.marked(place, self._q)

    async def _mark(self, place: Place, streams: Streams) -> tuple[PlacedMark, Mark | None]:
        """The mark of this event partition in a place: as it is stored, and what it says in the present incarnations."""
        if place not in streams.places:
            streams.places[place] = await stream_of(self._broker, stream_at(place))
        found = await read_mark(self._broker, self._marked(place))
        events = streams.events
        if found.mark is not None and found.mark.epoch == events.epoch:
            events = await reaching(self._broker, events, found.mark.seq)
        mark = translated(found, self._q, events, streams.places[place], streams.recorded)
        if mark and found.mark and await is_younger(self._broker, self._marked(place), mark.seq):
            raise younger(self._q, events.name, found.mark, mark)
        return found, mark

    async def _newest_term(self, home: Mark | None, streams: Streams) -> int:
        """The last owner's term. A home mark from a backup may be older than the foreign marks, which would refuse its heir."""
        log = streams.places[self._q]
        terms = [home.term if home else 0]
        if inherited(log) and (home is None or home.stream_epoch != log.epoch):
            for place in self._source.places(self._partitions):
                found = await read_mark(self._broker, self._marked(place))
                terms.append(found.mark.term if found.mark else 0)
        return max(terms)

    async def _take_over(self, place: Place, found: PlacedMark, mark: Mark | None, start_seq: int) -> MarkedWriter:
        assert self.streams is not None
        writer = self._writers[place] = await MarkedWriter.take_over(
            self._broker,
            self._marked(place),
            self._ownership,
            epoch=epoch_of(self.streams.places[place]),
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
        known = (self.streams.events, *self.streams.places.values())
        return any(now.get(state.name, state.epoch) != state.epoch for state in known)

    def check(self, state: StreamState) -> None:
        """A stream re-created in between has the same names and numbers, for other events."""
        if self.changed({state.name: state.epoch}):
            raise StepDown(f"{state.name} changed its incarnation")

    # --- work --------------------------------------------------------------------------------------------------------

    async def handle(self, batch: list[Delivered]) -> None:
        """Append the records of a batch of events, round by round."""
        with self._turns.work(self._source):
            await self._turns.pause(self._source)
            for round_ in rounds_by_steps(batch, self._ownership.source_epoch, self._spans):
                if round_ is None:
                    await asyncio.sleep(0)
                else:
                    await self._until_resumed()
                    await self._settle_round(round_)
                await self._turns.pause(self._source)

    async def _until_resumed(self) -> None:
        """Wait while the lane is paused: the events stay where they are, and so does the position."""
        lane, watched = self._source.lane, self._controls
        while lane is not None and watched is not None and watched.controls.paused(lane):
            end_if_cancelled()
            await asyncio.sleep(PAUSED_LOOK_SECONDS)

    async def pass_over(self, seq: int) -> None:
        """Move the home mark to `seq`: no event is left up to there. It says from which event on dead letters are missing now."""
        home, missing = self._writers[self._q], self.burials.missing
        if seq >= home.mark.next_seq:
            await home.append([], seq, missing=missing)
        elif missing != (home.mark.unburied, home.mark.refused):
            await home.append([], home.mark.seq, home.mark.user, missing=missing)

    async def _settle_round(self, round_: Round) -> None:
        self._followed = traced(self._spans, self._source, self._q, self._ownership.source_epoch, round_.planned)
        with self._followed or nullcontext():
            await self._settle(round_)

    async def _settle(self, round_: Round) -> None:
        for dead in round_.dead:
            with about_followed(trace_in(dead.delivered.headers)[0]):
                await self._bury(dead)
            with about(followed_dead(self._spans, dead.delivered.headers, dead.reason)):
                _log.warning("event_dead", reason=dead.reason, original=dead.delivered.seq, source=self.name)
            failpoints.reach("after-dead-letter")
        if round_.puts_off:
            round_.planned = await self._not_kept(round_)
        planned = await self._claim_events(round_.planned)
        failpoints.reach("after-claims-before-append")
        later = [event for event in planned if event.later is not None] if round_.puts_off else []
        now = [event for event in planned if event.later is None] if later else planned
        if later and self._shares is not None:
            await self._shares.count(later)
        look = Withholding(self._cancels, now)
        await look.look()
        entries: Entries = {}
        for _ in fan_out_by_steps(now, self._partitions, entries):
            await asyncio.sleep(0)
            await self._turns.pause(self._source)
        if later:
            time_there = datetime.fromtimestamp(await self._clock.now(), UTC)
            entries[LATER_PLACE] = [self._put_off(event, time_there) for event in later]
        home = entries.pop(self._q, [])
        if entries:
            # Where one fails, positions are read anew before anything is tried again.
            works = {
                f"append {self.name} to {place}": self._append_to(place, each, round_.end, look)
                for place, each in entries.items()
            }
            await together(works)
            failpoints.reach("between-foreign-and-home")
            await look.look()
        await self._append(self._q, home, round_.end, look)
        if self._followed is not None:
            self._followed.settled(now, later, round_.dead)
        self._count(round_, len(now), len(later), len(home) + sum(map(len, entries.values())) - len(later))

    async def _bury(self, dead: Dead) -> None:
        await self.burials.bury(dead)

    async def _bury_now(self, dead: Dead) -> None:
        """Store the letter before anything else goes on.

        Raises:
            BrokerError: it could not be stored; the position stays where it is.
        """
        await store_letter(self._broker, dead, self._q, self._ownership.source_epoch, budget_seconds=LETTER_SECONDS)

    async def _not_kept(self, round_: Round) -> list[Planned]:
        """The events of a round without those that LATER keeps already, or has no room for: the latter become dead letters.

        What is kept is not claimed again. Where Redis has lost the claim, and the source was restored since, the event would
        be claimed under a position that does not wait with it, and would pass for its own repetition when it is due.
        """
        try:
            kept = (await self._writer(LATER_PLACE)).mark
            later = await stream_of(self._broker, LATER.stream)
        except PartitionStopped:
            self._faulty.add(LATER_PLACE)
            raise
        new = [event for event in round_.planned if event.later is not None and not kept.covers(event.seq, "")]
        dead = await without_room(new, later, self._shares, self.burials, self._bury_now)
        round_.dead += dead.values()
        goes_on = {event.seq for event in new} - dead.keys()
        return [event for event in round_.planned if event.later is None or event.seq in goes_on]

    def _put_off(self, event: Planned, now: datetime) -> PutOff:
        claim, send_at = self._claim(event), event.accepted.event.send_at
        assert event.later is not None
        assert send_at is not None
        positions = (claim.position, *claim.former)
        return put_off(event.later, event.accepted, send_at, positions, now)

    async def _append_to(self, place: Place, entries: list[Entry | PutOff], end: End, look: Withholding) -> None:
        try:
            await self._append(place, entries, end, look)
        except PartitionStopped:
            self._faulty.add(place)
            raise

    async def _writer(self, place: Place) -> MarkedWriter:
        """The writer of a place, whose mark is taken over when it is first needed."""
        if place in self._writers:
            return self._writers[place]
        home = self._writers[self._q].mark
        assert self.streams is not None
        found, mark = await self._mark(place, self.streams)
        return await self._take_over(place, found, mark, start_seq=home.next_seq - 1)

    async def _append(self, place: Place, entries: Sequence[Entry | PutOff], end: End, look: Withholding) -> None:
        writer = await self._writer(place)
        missing, since = not_covered(entries, writer.mark), time.time_ns()
        due = batches(missing, place, *end, lambda: self._turns.most(self._source))
        turn = self._turns.turn(self._source)
        while True:
            async with turn:
                await look.look_if_old()
                batch = next(due)
                if batch.messages or place == self._q:
                    gone = self.burials.missing if place == self._q else NONE_MISSING
                    messages = with_schedules(batch.messages) if place == LATER_PLACE else batch.messages
                    await writer.append(messages, batch.seq, batch.user, missing=gone, until=look.until)
            if (batch.seq, batch.user) == end:
                break
        if self._followed is not None:
            self._followed.appended(place, missing, since)

    async def _claim_events(self, planned: list[Planned]) -> list[Planned]:
        """Those that were not published before. Where Redis is away, what must not repeat waits and the rest goes on."""
        if not planned:
            return planned
        claims = [self._claim(event) for event in planned]
        stall = Stall(CLAIMS, "partition_waits_for_claims")  # as it has `effectively_once` events
        try:
            while True:
                try:
                    ours = await self._claims.take(claims)
                except ClaimsUnavailable as error:
                    if not any(one.accepted.event.semantics == "effectively_once" for one in planned):
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
        accepted, seq = event.accepted, event.seq
        former: tuple[str, ...] = ()
        if shared:
            former = tuple(f"{epoch}.{seq}" for epoch, last in shared.items() if seq <= last)
        position = f"{self._ownership.source_epoch}.{seq}"
        return Claim(accepted.at.tenant_token, accepted.event.id, position, former, event.claimed)

    def _count(self, round_: Round, appended: int, put_off: int, records: int) -> None:
        counts = (appended, put_off, len(round_.planned) - appended - put_off, len(round_.dead))
        for counter, count in zip(_COUNTERS, counts, strict=True):
            if count:  # to count takes a lock
                counter.inc(count)
        metrics.dispatched_records.inc(records)
        if round_.oldest_nanoseconds:
            metrics.dispatch_delay_seconds.observe(max(0.0, time.time() - round_.oldest_nanoseconds / 1e9))
