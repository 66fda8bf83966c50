"""Dead letters: whole events that cannot be delivered, kept with the reason; some wait in EVENTS for room (ADR 0014)."""

from __future__ import annotations

import asyncio

import structlog

from engine import metrics
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, After, Broker, Stored
from engine.dispatch.following import trace_in
from engine.dispatch.rounds import Dead, Planned, plan
from engine.dispatch.source import EventSource
from engine.errors import ApiError, BrokerError, Unanswered
from engine.letters.headers import header_text
from engine.limits import APPEND_BUDGET_SECONDS, LETTER_SECONDS
from engine.log.incarnations import stream_of
from engine.log.marks import Mark
from engine.log.stalls import Stall
from engine.log.writer import Missing
from engine.partition.reader import PartitionReader, Phase
from engine.partition.worker import delivered
from seamark.protocol.subjects import DEAD_LETTERS_STREAM, dead_letter_subject

_log = structlog.get_logger("seamark.dispatcher")

NEITHER = "when it came there was room neither in LATER nor for the letters of what finds none there"
"""Why events are not put off while such letters are missing."""

RETRY_SECONDS = 5.0
"""How often letters that could not be stored are tried again."""


class Burials:
    """The dead events of one event partition.

    An event whose letter cannot be stored holds up no other event. It stays in EVENTS, and the mark says from which event on
    letters are missing. Once letters can be stored again, the events from there on are read again and buried. A letter that is
    stored already is not stored twice.

    An event that LATER has no room for would not look dead then. So from the first such event on none is put off, until all
    letters are stored: whichever is found there and was not due is dead.

    Attributes:
        first: the first event whose letter may be missing; None: no letter is missing.
        refused: the first of those from which on nothing is put off; None: events are put off.
    """

    def __init__(self, broker: Broker, event_partition: int, source: EventSource) -> None:
        self._broker = broker
        self._q = event_partition
        self._source = source.partition(event_partition)
        self._epoch = ""
        self._last = 0
        self._stall: Stall | None = None
        self.first: int | None = None
        self.refused: int | None = None

    @property
    def missing(self) -> Missing:
        """What the home mark has to say of it."""
        return Missing(self.first, self.refused)

    def take_over(self, events_epoch: str, mark: Mark | None) -> None:
        """Go on from what the home mark says. `events_epoch` is the incarnation of EVENTS it counts in."""
        self._epoch = events_epoch
        self.first, self.refused, self._last = (
            (None, None, 0) if mark is None else (mark.unburied, mark.refused, mark.seq)
        )

    async def bury(self, dead: Dead) -> None:
        """Store the letter, or leave its event to be buried later: at once where there is no room, else after 2 s of trying."""
        seq = dead.delivered.seq
        if self.first is None:
            try:
                await store_letter(self._broker, dead, self._q, self._epoch, budget_seconds=LETTER_SECONDS)
                return
            except BrokerError as error:
                self.first = seq
                self._report(error)
        self._last = max(self._last, seq)

    def refuse(self, first: int, last: int) -> None:
        """Leave events that cannot be put off, as there is no room for their letters; from then on none is put off."""
        self.first = first if self.first is None else self.first
        self.refused = first if self.refused is None else self.refused
        self._last = max(self._last, last)

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
        events = await stream_of(self._broker, self._source.stream)
        if self.first is not None and events.first_seq > self.first:
            metrics.dead_letters_trimmed.inc()
            _log.error("dead_letters_may_be_lost", first_seq=events.first_seq)
        while self.first is not None and self.first <= (last := self._last):
            page = await self._page(self.first, last)
            for stored in page:
                self.first = stored.seq
                found = plan(delivered(stored), epoch)
                if (
                    isinstance(found, Planned)
                    and found.later
                    and self.refused is not None
                    and stored.seq >= self.refused
                ):
                    found = no_room(found, NEITHER)
                if isinstance(found, Dead):
                    await store_letter(self._broker, found, self._q, epoch)
                if self._epoch != epoch:
                    return  # the partition was taken over meanwhile, in another incarnation of EVENTS
                self.first = stored.seq + 1
            if not page:
                self.first = last + 1
        self.first = self.refused = None
        _log.info("dead_letters_stored_again", partition=self._q)

    async def _page(self, seq: int, last: int) -> list[Stored]:
        """The next events from `seq` on, up to `last`; only a leader that shows all up to there is believed when there is none.

        Raises:
            BrokerError: as `_bury_left`; Unanswered also while the leader, which was just elected, does not show so much yet.
        """
        source = self._source
        page = (await self._broker.next_by_subject(source.stream, source.subject, seq)).records
        if not page:
            events = await stream_of(self._broker, source.stream)
            if events.last_seq < last:
                raise Unanswered(f"{source.stream} ends at {events.last_seq} by its leader, and {last} was dispatched")
            stored = await self._broker.leader_next(source.stream, source.subject, seq)
            page = [] if stored is None else [stored]
        return [stored for stored in page if stored.seq <= last]

    def _report(self, error: BrokerError) -> None:
        self._stall = self._stall or Stall(DEAD_LETTERS_STREAM, "dead_letters_not_stored")
        self._stall.report(error)

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.over()
            self._stall = None


def no_room(event: Planned, why: str) -> Dead:
    """An event that is not due, and cannot wait in LATER."""
    assert event.later is not None
    return Dead(event.later, "later_full", why)


async def store_letter(
    broker: Broker, dead: Dead, event_partition: int, epoch: str, *, budget_seconds: float = APPEND_BUDGET_SECONDS
) -> None:
    """Store a dead letter, once per event however often it is tried: its subject may hold one message only.

    Raises:
        Unavailable, Unanswered, ApiError: it could not be stored; the event must not be passed over then.
    """
    event = dead.delivered
    headers = {
        "Seamark-Reason": dead.reason,
        "Seamark-Detail": header_text(dead.detail),
        "Seamark-Original": f"{epoch}.{event.seq}",
        "Seamark-Subject": header_text(event.subject.decode("utf-8", "replace")),
    }
    for name, value in zip(("traceparent", "tracestate"), trace_in(event.headers), strict=True):
        if value:
            headers[name] = header_text(value.decode("utf-8", "replace"))
    subject = dead_letter_subject(event_partition, epoch, event.seq)
    try:
        after = After(DEAD_LETTERS_STREAM, 0)
        await broker.append(subject, event.payload, headers, after=after, budget_seconds=budget_seconds)
    except ApiError as error:
        if error.err_code != WRONG_LAST_SEQUENCE:
            raise
