"""Events that were put off, dispatched when they are due."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import structlog

from engine.dispatch.later import NotPutOff, due_by, moment_of
from engine.dispatch.rounds import Dead, due_rounds
from engine.dispatch.worker import DispatchWorker
from engine.partition.worker import Delivered
from engine.tasks import end_if_cancelled

_log = structlog.get_logger("seamark.dispatcher")

TIMER_SECONDS = 0.001
"""So much too early a timer may end: the event loop counts in milliseconds."""


class DueWorker(DispatchWorker):
    """One partition of LATER: what it reads are wake-ups, and what it dispatches are the events that these say to be due."""

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
