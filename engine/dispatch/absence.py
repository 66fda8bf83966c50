"""Whether anybody dispatched lately: what is due stays in LATER for seven days, and then it leaves no trace in any stream."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog
from redis.asyncio import Redis

from engine import metrics
from engine.broker.jetstream import Broker
from engine.dispatch.claims import AWAY, TAKE_TIMEOUT_SECONDS
from engine.dispatch.later import MARGIN_SECONDS
from engine.limits import DUE_SECONDS

_log = structlog.get_logger("seamark.dispatcher")

SEEN_KEY: Final = "dispatchers:seen"
"""When a dispatcher was last at work, in Unix time. A Redis that was lost says nothing, and raises no alarm."""

LOOK_SECONDS: Final = 60.0


class Absence:
    """Says when nobody dispatched for as long as LATER keeps what is due. Of processes that begin together one says so."""

    def __init__(self, broker: Broker, redis: Redis) -> None:
        self._broker = broker
        self._redis = redis

    async def watch(self) -> None:
        """Look, and leave word of being here, for ever."""
        while True:
            if self._broker.connected:
                try:
                    async with asyncio.timeout(TAKE_TIMEOUT_SECONDS):
                        await self.look()
                except AWAY as error:
                    _log.debug("absence_not_looked_at", error=type(error).__name__)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Once.

        Raises:
            RedisError, OSError: as redis-py does.
        """
        now = int(time.time())
        seen = await self._redis.set(SEEN_KEY, now, get=True)
        if seen is not None and now - int(seen) > DUE_SECONDS - MARGIN_SECONDS:
            metrics.dispatchers_absent.inc()
            _log.error("due_events_may_be_lost", nobody_dispatched_for_days=round((now - int(seen)) / 86_400, 1))
