"""Events that were put off, dispatched when they are due."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from datetime import datetime

import structlog

from engine import metrics
from engine.dispatch.later import MARGIN_SECONDS, NotPutOff, due_by, moment_of
from engine.dispatch.rounds import Dead, due_rounds
from engine.dispatch.worker import DispatchWorker
from engine.errors import ApiError
from engine.limits import DUE_SECONDS
from engine.partition.worker import Delivered
from engine.tasks import end_if_cancelled

_log = structlog.get_logger("seamark.dispatcher")

WRITTEN_AGAIN_SECONDS = 3600.0
"""How often the mark is written where nothing is due: much less than what is due is kept for."""

TIMER_SECONDS = 0.001
"""So much too early a timer may end: the event loop counts in milliseconds."""


class DueWorker(DispatchWorker):
    """One partition of LATER: what it reads are wake-ups, and what it dispatches are the events that these say to be due."""

    _written_at = 0.0

    async def acquire(self) -> int:
        """As of others. A mark that is older than what LATER keeps says that events may have left it unsent: nobody was there."""
        marked, before = self._marked(self._q), None
        with contextlib.suppress(ApiError):  # a log that is missing is the business of what follows
            before = await self._broker.leader_last(marked.name, marked.subject)
        next_seq = await super().acquire()
        self._written_at = time.monotonic()
        if before is not None:
            seconds = await self._clock.now() - datetime.fromisoformat(before.time).timestamp()
            if seconds > DUE_SECONDS - MARGIN_SECONDS:
                metrics.partition(self.reads.stream, self.reads.consumer).possibly_trimmed.inc()
                _log.error(
                    "due_events_may_be_lost", source=self.name, nobody_dispatched_for_days=round(seconds / 86_400, 1)
                )
        return next_seq

    async def pass_over(self, seq: int) -> None:
        """As of others, and once an hour in any case: an old mark says that nobody was there."""
        home = self._writers[self._q]
        before = home.mark
        await super().pass_over(seq)
        if home.mark is before and time.monotonic() - self._written_at >= WRITTEN_AGAIN_SECONDS:
            await home.append([], before.seq, before.user, missing=self.burials.missing)
        if home.mark is not before:
            self._written_at = time.monotonic()

    async def handle(self, batch: list[Delivered]) -> None:
        """Dispatch what the wake-ups of a batch are for, each event when its time has come."""
        for wake_up in batch:
            try:
                await self._settle_slot(wake_up)
            except NotPutOff as error:
                _log.error("no_wake_up", why=str(error), source=self.name, seq=wake_up.seq)

    async def _settle_slot(self, wake_up: Delivered) -> None:
        """The mark ends up behind the wake-up, even of one that brings nothing: by it others know that all is dispatched."""
        mark = self._writers[self._q].mark
        done = mark.user if mark.seq == wake_up.seq else None
        async with aclosing(due_by(self._broker, self._q, wake_up, done)) as pages:
            page = await anext(pages, None)
            if page is None:
                await self.pass_over(wake_up.seq)
            while page is not None:
                following = await anext(pages, None)  # all of it is stored already
                early = moment_of(page.tenth).timestamp() - await self._clock.now()
                if early > 0:
                    await asyncio.sleep(early + TIMER_SECONDS)
                end_if_cancelled()
                for round_ in due_rounds(page, wake_up, last=following is None, spans=self._spans):
                    await self._settle_round(round_)
                page = following

    async def _bury(self, dead: Dead) -> None:
        """No event of LATER waits for its letter: read again, it would be taken for one that may be dispatched."""
        await self._bury_now(dead)
