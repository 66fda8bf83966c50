"""What all sessions of one partition share: the watch on its leader, the readers of heads and pages, the logs followed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.broker.jetstream import Broker
from engine.limits import SCAN_FEEDS_PER_TURN
from gateway.join.port import LogState
from gateway.limits import HEADS_EVERY_SECONDS
from gateway.log.heads import Heads
from gateway.log.live import UserLog
from gateway.log.reader import Reader
from gateway.log.watch import Watch
from gateway.session.follower import Follower
from gateway.stores.counts import Counts
from projections.unread.reader import UnreadReader
from seamark.protocol.subjects import log_stream, mark_subject


class Partition:
    """One partition of the logs, as this process reads it, and of the counts that projections have made of them."""

    def __init__(self, broker: Broker, number: int, queries: UnreadReader | None = None) -> None:
        self.number = number
        self.stream = log_stream(number)
        self.watch = Watch(broker, self.stream, self._tell)
        self.heads = Heads(broker, self.stream, self.watch, mark_subject(number, number))
        self.reader = Reader(broker, self.stream)
        self.logs: dict[tuple[str, str], UserLog] = {}
        self.counts = Counts(queries, number, self.watch, self.logs)
        self._suspicion = asyncio.Event()
        self._checking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch the leader and to compare heads and counts."""
        self.watch.start()
        self.counts.start()
        self._checking = asyncio.create_task(self._check_heads(), name=f"heads-check-{self.stream}")

    def suspect(self) -> None:
        """Live copies may have been lost (a reconnect, a slow consumer, a new leader): ask the leader, compare all heads."""
        self.watch.doubt()
        self.counts.suspect()
        self._suspicion.set()

    async def close(self) -> None:
        """Stop everything under way."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        await self.counts.close()
        await self.heads.close()
        await self.reader.close()
        await self.watch.close()

    async def _check_heads(self) -> None:
        while True:
            try:
                async with asyncio.timeout(HEADS_EVERY_SECONDS):
                    await self._suspicion.wait()
            except TimeoutError:
                pass  # the ordinary round
            self._suspicion.clear()
            await self._each(lambda follower: follower.check())

    async def _tell(self, state: LogState) -> None:
        await self._each(lambda follower: follower.watch(state))

    async def _each(self, act: Callable[[Follower], None]) -> None:
        """Every follower once, a few per turn of the loop, so that a live record waits for no scan."""
        done = 0
        for log in list(self.logs.values()):
            for follower in log.followers:
                act(follower)
                done += 1
            if done >= SCAN_FEEDS_PER_TURN:
                done = 0
                await asyncio.sleep(0)
