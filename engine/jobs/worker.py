"""The worker of a channel: takes jobs from its lanes, handles a bounded number of them at a time, and leaves in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from engine.broker.jetstream import Broker
from engine.channels.channel import Lane
from engine.jobs.handling import LEASE_SECONDS, SEND_SECONDS, Handler
from engine.jobs.messages import LANES
from engine.jobs.queue import ACK_WAIT_SECONDS, KEEP_SECONDS, PulledJob, PulledLane
from engine.jobs.unreadable import UnreadableMessages
from engine.plan.rules import Channel
from engine.tasks import end_if_cancelled
from engine.traces.lines import about_followed

_log = structlog.get_logger("seamark.worker")

AT_A_TIME: Final = 64
"""Jobs of a channel that a process handles at a time: at 200 ms for a request that is 320 a second. FCM allows 1000 at once."""

AHEAD: Final = 16
"""Jobs of each lane that it holds ready. They are kept from other workers meanwhile, so they are few."""

WEIGHTS: Final[Mapping[Lane, int]] = {"critical": 12, "normal": 3, "bulk": 1}
"""How often lanes that have jobs take turns: bulk goes on in any backlog, and slows the others by a sixteenth."""

TURN_SECONDS: Final = 0.2
"""How often a worker to which nothing happens looks whether its pulls have ended or were lost."""

DRAIN_SECONDS: Final = SEND_SECONDS + 5.0
"""How long a worker takes to leave, at most: what is on its way comes, and jobs under way end: a try, and what follows."""

assert ACK_WAIT_SECONDS > LEASE_SECONDS, "whoever is handed a job again must find the lease of the one before over"


class Worker:
    """Works on the jobs of one channel until cancelled. Any number of workers share them.

    Args:
        open: whether jobs of a lane are worth taking now; those that are not taken stay where they are.
    """

    def __init__(
        self, broker: Broker, channel: Channel, handler: Handler, open: Callable[[Lane], bool] = lambda _lane: True
    ) -> None:
        self.channel = channel
        self._open = open
        self._handler = handler
        self._news = asyncio.Event()
        self._unreadable = UnreadableMessages(channel, handler, self._news.set)
        self._lanes = {lane: PulledLane(broker, channel, lane, self._news.set, self._unreadable.add) for lane in LANES}
        self._turns = dict.fromkeys(LANES, 0)
        self._busy: dict[asyncio.Task[None], PulledJob] = {}

    async def run(self) -> None:
        """Take jobs for as long as it is not cancelled; then hand back what is not begun, and finish the rest."""
        for lane in self._lanes.values():
            await lane.open()
        loop = asyncio.get_running_loop()
        keeper = asyncio.create_task(self._keep(), name=f"{self.channel}-keep")
        try:
            while True:
                end_if_cancelled()
                self._news.clear()
                self._begin()
                for name, lane in self._lanes.items():
                    if not self._unreadable.full and lane.lacks(AHEAD) and self._open(name):
                        lane.order(AHEAD)
                # A timer by itself: `asyncio.timeout` costs five times as much, and under load this is once for each job.
                turn = loop.call_later(TURN_SECONDS, self._news.set)
                try:
                    await self._news.wait()
                finally:
                    turn.cancel()
        finally:
            try:
                await self._drain()
            finally:
                self._unreadable.close()
                keeper.cancel()

    def _begin(self) -> None:
        """Begin as many of the waiting jobs as there is room for."""
        while len(self._busy) < AT_A_TIME and (pulled := self._next()) is not None:
            task = asyncio.create_task(self._handle(pulled), name=f"{self.channel}-job")
            self._busy[task] = pulled
            task.add_done_callback(self._ended)

    def _next(self) -> PulledJob | None:
        """The next job: lanes that have some take turns by their weights (smooth weighted round robin)."""
        ready = [lane for lane in LANES if self._lanes[lane].waiting]
        if not ready:
            return None
        if len(ready) == 1:
            return self._lanes[ready[0]].waiting.popleft()
        for lane in ready:
            self._turns[lane] += WEIGHTS[lane]
        chosen = max(ready, key=lambda lane: self._turns[lane])
        self._turns[chosen] -= sum(WEIGHTS[lane] for lane in ready)
        return self._lanes[chosen].waiting.popleft()

    async def _handle(self, pulled: PulledJob) -> None:
        with about_followed(pulled.job.trace):
            try:
                await self._handler.handle(pulled)
            except Exception:
                # One job must not end the others. It is handed out again, and is poison if that helps nothing.
                _log.exception("job_not_handled", channel=self.channel, lane=pulled.job.lane)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._busy.pop(task, None)
        self._news.set()

    async def _keep(self) -> None:
        """Tell the broker again and again which jobs are worked on, or wait for it."""
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            end_if_cancelled()
            for pulled in (*self._busy.values(), *(one for lane in self._lanes.values() for one in lane.waiting)):
                pulled.keep()

    async def _drain(self) -> None:
        """Leave nothing in doubt that does not have to be: jobs that are being sent are waited for, others handed back."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
                waiting = [one for lane in self._lanes.values() for one in lane.waiting]
                backs = (self._handler.hand_back(one) for one in waiting)
                await asyncio.gather(self._unreadable.settle(), *backs, return_exceptions=True)
                if self._busy:
                    await asyncio.wait(set(self._busy))
        except TimeoutError:
            _log.warning("jobs_left_under_way", channel=self.channel, jobs=len(self._busy))
            for task in self._busy:
                task.cancel()
