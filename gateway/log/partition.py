"""What all sessions of one partition share: the watch on its leader, the readers of heads and pages, the logs followed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain, repeat

import structlog

from engine.broker.jetstream import Broker
from engine.limits import SCAN_FEEDS_PER_TURN
from engine.tasks import end, end_if_cancelled, set_or_after
from gateway.join.port import LogState
from gateway.limits import COMPARE_SECONDS
from gateway.log.heads import Heads
from gateway.log.live import Listener, Live, UserLog
from gateway.log.reader import Reader
from gateway.log.watch import Watch
from gateway.stores.counts import USERS_MAX, Counts
from projections.unread.reader import UnreadReader
from seamark.protocol.subjects import live_subject, log_stream, mark_subject

_log = structlog.get_logger("seamark.partition")


class Partition:
    """One partition of the logs, as this process reads it, and of the counts that projections have made of them.

    Attributes:
        logs: those followed here, by tenant and user.
    """

    def __init__(self, broker: Broker, number: int, live: Live, queries: UnreadReader | None = None) -> None:
        self.number = number
        self.stream = log_stream(number)
        self.watch = Watch(broker, self.stream, self._tell)
        self.heads = Heads(broker, self.stream, self.watch, mark_subject(number, number))
        self.reader = Reader(broker, self.stream)
        self.counts = Counts(queries, number, lambda: self.watch.last.epoch if self.watch.last else None)
        self.logs: dict[tuple[str, str], UserLog] = {}
        self._live = live
        self._suspicion = asyncio.Event()
        self._comparing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch the leader and to compare heads and counts."""
        self.watch.start()
        self._comparing = asyncio.create_task(self._compare(), name=f"compare-{self.stream}")

    def join(self, listener: Listener, tenant: str, user: str) -> UserLog:
        """Follow a user's log; see `UserLog.join`."""
        log = self.logs.get((tenant, user))
        if log is None:
            log = self.logs[(tenant, user)] = UserLog(self.number, tenant, user)
            log.subscription = self._live.subscribe(live_subject(self.number, tenant, user), log)
        log.join(listener)
        return log

    def leave(self, listener: Listener, log: UserLog) -> None:
        """Stop following; the last session of a user ends the subscription."""
        log.leave(listener)
        if not log.listeners and self.logs.pop(log.key, None) is not None:
            log.unsubscribe()

    def suspect(self) -> None:
        """Live copies may have been lost (a reconnect, a slow consumer, a new leader): ask the leader, compare everything."""
        self.watch.doubt()
        self._suspicion.set()

    async def close(self) -> None:
        """Stop everything under way."""
        await end(self._comparing)
        await self.counts.close()
        await self.heads.close()
        await self.reader.close()
        await self.watch.close()

    async def _compare(self) -> None:
        """What was lost on its way to a session is noticed here: the last copy of a log, or the last change of a count."""
        while True:
            await set_or_after(self._suspicion, COMPARE_SECONDS)
            end_if_cancelled()
            try:
                await self._each(lambda listener: listener.check())
                await self._compare_counts()
            except Exception:
                # Without this task a loss is never noticed; what we did not foresee must not end it.
                _log.exception("comparing_failed", stream=self.stream)

    async def _compare_counts(self) -> None:
        logs = list(self.logs.values()) if self.counts.readable else []
        for start in range(0, len(logs), USERS_MAX):
            part = logs[start : start + USERS_MAX]
            counts = await self.counts.read([log.user for log in part])
            for log, count in zip(part, chain(counts, repeat(None)), strict=False):
                log.compare(count)
            await asyncio.sleep(0)

    async def _tell(self, state: LogState) -> None:
        await self._each(lambda listener: listener.watch(state))

    async def _each(self, act: Callable[[Listener], None]) -> None:
        """Every listener once, a few per turn of the loop, so that a live record waits for no scan."""
        done = 0
        for log in list(self.logs.values()):
            for listener in log.listeners:
                act(listener)
                done += 1
            if done >= SCAN_FEEDS_PER_TURN:
                done = 0
                await asyncio.sleep(0)
