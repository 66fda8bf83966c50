"""Who goes first among the sources that one process dispatches (ADR 0037, ADR 0051)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from types import TracebackType
from typing import Final

from engine.dispatch.source import EventSource
from engine.limits import BATCH_MESSAGES_MAX, BESIDE_MESSAGES_MAX

WAIT_SECONDS: Final = 0.05
"""How long a batch of what may wait waits for the others. It is a share of the process, too: while urgent events come without a
pause, 20 batches a second of what may wait are still appended, so that no backlog stands still for ever."""


LULL_SECONDS: Final = 0.5
"""Urgent events are expected for so long after the last one."""

BESIDE_PAUSES: Final = 3
"""While they come, what may wait is at rest after each batch for so many times as long as the batch took: it is at work for a
quarter of the time, here and in the broker, and most urgent events find nothing before them."""

PAUSE_SECONDS_MAX: Final = 0.1
"""A batch that took long because a log took nothing says nothing about the broker's work."""


class Turns:
    """Lets urgent sources go first.

    What may wait is built and appended one batch of a source at a time, each when nothing urgent is under way; a small one while
    urgent events come. So however much of it waits, an urgent event finds at most one such batch of each source before it, in
    this process and in the broker.
    """

    def __init__(self) -> None:
        self._urgent = _Urgent()
        self._patient: dict[str, _Patient] = {}

    def work(self, source: EventSource) -> AbstractContextManager[None]:
        """To be entered for as long as events of `source` are worked on."""
        return self._urgent if source.urgent else nullcontext()

    def most(self, source: EventSource) -> int:
        """How many messages the next batch of `source` may have."""
        if source.urgent or self._urgent.over_for(LULL_SECONDS):
            return BATCH_MESSAGES_MAX
        return BESIDE_MESSAGES_MAX

    async def pause(self, source: EventSource) -> None:
        """To be awaited between two pieces of work on `source`: where it may wait, until nothing urgent is under way."""
        if not source.urgent and not self._urgent.none.is_set():
            await self._urgent.quiet()

    def turn(self, source: EventSource) -> AbstractAsyncContextManager[None]:
        """To be entered for each batch of `source`: waits until it is its turn."""
        if source.urgent:
            return nullcontext()
        if source.stream not in self._patient:
            # What is due is due now: it rests for nobody.
            self._patient[source.stream] = _Patient(self._urgent, 0 if source.due else BESIDE_PAUSES)
        return self._patient[source.stream]


class _Urgent:
    """How much urgent work is under way. `none`: there is none."""

    def __init__(self) -> None:
        self.none = asyncio.Event()
        self.none.set()
        self._ended_at = -math.inf
        self._number = 0

    def over_for(self, seconds: float) -> bool:
        """Whether none has been under way for so long."""
        return not self._number and time.monotonic() >= self._ended_at + seconds

    async def quiet(self) -> None:
        """Wait until there is none, and no longer than `WAIT_SECONDS`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS):
                await self.none.wait()

    def __enter__(self) -> None:
        self._number += 1
        self.none.clear()

    def __exit__(self, *_: object) -> None:
        self._number -= 1
        self._ended_at = time.monotonic()
        if not self._number:
            self.none.set()


class _Patient:
    """The turn of a source that may wait.

    Args:
        pauses: how many times as long as a batch took there is none after it while urgent events come.
    """

    def __init__(self, urgent: _Urgent, pauses: int) -> None:
        self._urgent = urgent
        self._pauses = pauses
        self._one = asyncio.Lock()
        self._began = self._rests_until = -math.inf

    async def __aenter__(self) -> None:
        await self._one.acquire()
        try:
            pause = self._rests_until - time.monotonic()
            if pause > 0 and not self._urgent.over_for(LULL_SECONDS):
                await asyncio.sleep(pause)
            await self._urgent.quiet()
        except BaseException:
            self._one.release()
            raise
        self._began = time.monotonic()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        now = time.monotonic()
        self._rests_until = now + min(PAUSE_SECONDS_MAX, self._pauses * (now - self._began))
        self._one.release()
