"""What becomes of messages of JOBS that a worker cannot read: they are put back for a while, and then kept as dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from engine import metrics
from engine.countedline import CountedLine
from engine.errors import BrokerError, StoreUnavailable
from engine.jobs.desk import NotNow
from engine.jobs.handling import Handler
from engine.jobs.queue import PulledUnreadable
from engine.patience import passes
from engine.plan.rules import Channel

PUT_BACK_SECONDS: Final = (2.0, 10.0, 30.0, 80.0)
"""For how long such a message is put back, each time, before it becomes a letter. While workers are replaced, one of a newer
version may take it: soon where there is one, and two minutes are enough for most deployments to bring it. It is put back as a
schedule: the broker hands out a bounded number of unacknowledged messages, and these would take the places of jobs."""

UNDER_WAY_MAX: Final = 16
"""With so many under way the worker orders no more. So there are never more of them than these and what was on order, and each is
put back at its first delivery: further ones would count as crashes."""

LETTERS_AT_A_TIME: Final = 8
"""Letters that are stored at a time. Further messages are put back, so that letters nobody can store leave room for others."""

SETTLE_SECONDS: Final = 5.0
"""How long what is under way is waited for when the worker leaves. To put a message back takes far less; one whose letter takes
longer is handed out again."""


class UnreadableMessages:
    """For one worker: puts unreadable messages back, or keeps them as dead letters. None of them holds a place that is for jobs.

    Args:
        on_room: called when a message was put back, kept, or given up for now.
    """

    def __init__(self, channel: Channel, handler: Handler, on_room: Callable[[], None]) -> None:
        self._channel = channel
        self._handler = handler
        self._on_room = on_room
        self._under_way: set[asyncio.Task[None]] = set()
        self._letters = 0
        # Two lines: the traceback of a fault must be said although an outage was told of a moment before.
        self._outages = CountedLine("seamark.worker", "job_not_set_aside", channel=channel)
        self._faults = CountedLine("seamark.worker", "job_not_set_aside", channel=channel)

    @property
    def full(self) -> bool:
        """Whether no more should be ordered for now."""
        return len(self._under_way) >= UNDER_WAY_MAX

    def add(self, pulled: PulledUnreadable) -> None:
        """Begin with a message that was handed out."""
        task = asyncio.create_task(self._put_back_or_keep(pulled), name=f"{self._channel}-unreadable")
        self._under_way.add(task)
        task.add_done_callback(self._done)

    async def settle(self) -> None:
        """Returns when nothing is under way any more, or after `SETTLE_SECONDS`."""
        if self._under_way:
            await asyncio.wait(set(self._under_way), timeout=SETTLE_SECONDS)

    def close(self) -> None:
        """Give up what is still under way: it is handed out again after `ack_wait`."""
        for task in self._under_way:
            task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._on_room()

    async def _put_back_or_keep(self, pulled: PulledUnreadable) -> None:
        """Put the message back or, once that was done often enough, keep it as a dead letter.

        Where neither can be done, it comes again after `ack_wait`.
        """
        try:
            if pulled.times < len(PUT_BACK_SECONDS) and await self._put_back(pulled, PUT_BACK_SECONDS[pulled.times]):
                return
            wait_seconds = await self._keep(pulled)
            if wait_seconds:
                await pulled.put_back(wait_seconds)
                return
            await pulled.end()
        except Exception as error:
            self._tell(error)
        else:
            metrics.jobs_unreadable.labels(self._channel).inc()

    async def _put_back(self, pulled: PulledUnreadable, seconds: float) -> bool:
        """False: it can never be, such as where a message leaves no room for the headers of a schedule."""
        try:
            await pulled.put_back(seconds)
        except Exception as error:
            if passes(error):
                raise
            self._tell(error)
            return False
        return True

    async def _keep(self, pulled: PulledUnreadable) -> float:
        """Store a message as a dead letter. Returns the seconds after which to try again; 0: it is stored."""
        if self._letters >= LETTERS_AT_A_TIME:
            return PUT_BACK_SECONDS[-1]
        self._letters += 1
        try:
            await self._handler.set_aside(pulled.unreadable)
        except NotNow as error:
            return error.seconds
        except Exception as error:
            # Whatever is the matter with letters, jobs that need none must not wait for it.
            self._tell(error)
            return PUT_BACK_SECONDS[-1]
        finally:
            self._letters -= 1
        return 0.0

    def _tell(self, error: Exception) -> None:
        outage = isinstance(error, BrokerError | StoreUnavailable)
        line = self._outages if outage else self._faults
        line.add(error=type(error).__name__, exc_info=not outage)
