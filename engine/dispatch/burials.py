"""Which dead letters of an event partition are stored, and which still wait in EVENTS for room (ADR 0014)."""

from __future__ import annotations

import asyncio
from datetime import datetime

import structlog

from engine import metrics
from engine.broker.jetstream import Broker, Stored
from engine.dispatch import deadletters
from engine.dispatch.rounds import Dead, plan
from engine.errors import BrokerError
from engine.limits import LETTER_SECONDS
from engine.log.incarnations import stream_of
from engine.log.marks import Mark
from engine.log.stalls import Stall
from engine.partition.reader import Delivered, PartitionReader, Phase
from seamark.protocol.subjects import DEAD_LETTERS_STREAM, EVENTS_STREAM

_log = structlog.get_logger("seamark.dispatcher")

RETRY_SECONDS = 5.0
"""How often letters that could not be stored are tried again."""


class Burials:
    """The dead events of one event partition.

    An event whose letter cannot be stored holds up no other event. It stays in EVENTS, and the mark says from which event on
    letters are missing. Once letters can be stored again, the events from there on are read again and buried. A letter that is
    stored already is not stored twice.

    Attributes:
        first: the first event whose letter may be missing; None: no letter is missing.
    """

    def __init__(self, broker: Broker, event_partition: int) -> None:
        self._broker = broker
        self._q = event_partition
        self._epoch = ""
        self._last = 0
        self._none_found_from: int | None = None
        self._stall: Stall | None = None
        self.first: int | None = None

    def take_over(self, events_epoch: str, mark: Mark | None) -> None:
        """Go on from what the home mark says. `events_epoch` is the incarnation of EVENTS it counts in."""
        self._epoch, self._none_found_from = events_epoch, None
        self.first, self._last = (None, 0) if mark is None else (mark.unburied, mark.seq)

    async def bury(self, dead: Dead) -> None:
        """Store the letter, or leave its event to be buried later: at once where there is no room, else after 2 s of trying."""
        seq = dead.delivered.seq
        if self.first is None:
            try:
                await deadletters.bury(self._broker, dead, self._q, self._epoch, budget_seconds=LETTER_SECONDS)
                return
            except BrokerError as error:
                self.first = seq
                self._report(error)
        self._last = max(self._last, seq)

    async def tend(self, reader: PartitionReader) -> None:
        """Bury the events that were left, for as long as `reader` owns the partition; ends by cancellation."""
        try:
            while True:
                await asyncio.sleep(RETRY_SECONDS)
                if reader.phase is not Phase.READING or self.first is None:
                    self._end_stall()
                    continue
                try:
                    await self._bury_left()
                except BrokerError as error:
                    self._report(error)
                except Exception:
                    # Without this task dead letters would be missing for ever, so an unforeseen error must not end it.
                    _log.exception("burying_failed", partition=self._q)
        finally:
            self._end_stall()

    async def _bury_left(self) -> None:
        """Read the events again from the first that may have no letter.

        Raises:
            BrokerError: an event could not be read, or a letter not stored; `first` says how far this came.
        """
        epoch = self._epoch
        events = await stream_of(self._broker, EVENTS_STREAM)
        if self.first is not None and events.first_seq > self.first:
            metrics.dead_letters_trimmed.inc()
            _log.error("dead_letters_may_be_lost", first_seq=events.first_seq)
        while self.first is not None and self.first <= (last := self._last):
            page = await self._page(self.first)
            due = [stored for stored in page if stored.seq <= last]
            for stored in due:
                if isinstance(found := plan(_delivered(stored), epoch), Dead):
                    await deadletters.bury(self._broker, found, self._q, epoch)
                if self._epoch != epoch:
                    return  # the partition was taken over meanwhile, in another incarnation of EVENTS
                self.first = stored.seq + 1
            if not page and self._none_found_from != self.first:
                # A leader that was just elected may not show everything yet, so it is asked once more in the next round.
                self._none_found_from = self.first
                return
            if len(due) < len(page) or not page:
                self.first = last + 1
        self.first = None
        _log.info("dead_letters_stored_again", partition=self._q)

    async def _page(self, seq: int) -> list[Stored]:
        """The next events from `seq` on. Only the leader is believed when there is none."""
        subject = f"ev.{self._q}.>"
        page = await self._broker.next_by_subject(EVENTS_STREAM, subject, seq)
        if page.records:
            return page.records
        stored = await self._broker.leader_next(EVENTS_STREAM, subject, seq)
        return [] if stored is None else [stored]

    def _report(self, error: BrokerError) -> None:
        self._stall = self._stall or Stall(DEAD_LETTERS_STREAM, "dead_letters_not_stored")
        self._stall.report(error)

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.over()
            self._stall = None


def _delivered(stored: Stored) -> Delivered:
    at = int(datetime.fromisoformat(stored.time).timestamp() * 1e9)
    return Delivered(stored.subject.encode(), stored.seq, at, stored.headers, stored.payload)
