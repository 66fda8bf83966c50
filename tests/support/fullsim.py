"""LATER and DEAD-LETTERS without room, now and then, in simulated worlds: whoever finds none is killed at any await."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from engine.broker.answers import WATERMARK_KEY
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, Page, PubAck, Stored, StreamState
from engine.dispatch.worker import DispatchWorker
from engine.errors import ApiError, BrokerError, Unanswered, Unavailable
from engine.partition.worker import Delivered
from tests.support.latersim import NOW, LaterBroker, LaterWorld

NO_ROOM = 10077


class FullBroker(LaterBroker):
    """LATER is full as often as not, and DEAD-LETTERS too, until it is calm. EVENTS can be read again."""

    def __init__(self, world: FullWorld) -> None:
        super().__init__(world.rng)
        self.world = world
        self.letters: dict[str, bytes] = {}
        self.refused_letters = 0

    def state(self, name: str) -> StreamState:
        found = super().state(name)
        if name != "LATER":
            return found
        full = self._fault(0.5)
        return replace(found, bytes=int(full), config={"metadata": {**found.metadata, WATERMARK_KEY: "1"}})

    async def append(self, subject: str, payload: bytes, headers: Mapping[str, str], **_: Any) -> PubAck:
        await self._pass_time()
        if self._fault(0.5):
            self.refused_letters += 1
            raise ApiError(503, NO_ROOM, "maximum bytes exceeded")
        if self._fault(0.05):
            raise Unavailable
        if subject in self.letters:
            raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence")
        self.letters[subject] = payload
        if self._fault(0.1):
            raise Unanswered
        return PubAck("DEAD-LETTERS", len(self.letters))

    def _events(self, seq: int) -> list[Stored]:
        at = datetime.fromtimestamp(NOW / 1e9, UTC).isoformat()
        found = [event for event in self.world.events if event.seq >= seq]
        return [Stored(event.subject.decode(), event.seq, at, event.headers, event.payload) for event in found]

    async def leader_next(self, stream: str, subject: str, seq: int, **_: Any) -> Stored | None:
        if stream != "EVENTS" or subject == ">":
            return await super().leader_next(stream, subject, seq)
        await self._pass_time()
        return next(iter(self._events(seq)), None)

    async def next_by_subject(self, stream: str, subject: str, seq: int, **_: Any) -> Page:
        if stream != "EVENTS":
            return await super().next_by_subject(stream, subject, seq)
        await self._pass_time()
        found = self._events(seq)
        return Page(found[: self.rng.randint(1, 3)], more=len(found) > 3)


class FullWorld(LaterWorld):
    """Nothing is restored in it, and no claim is lost."""

    def __init__(self, seed: int, *, events: int = 24) -> None:
        super().__init__(seed * 2, events=events)
        self.broker: FullBroker = FullBroker(self)

    async def reading(self, worker: DispatchWorker, source: Callable[[], list[Delivered]]) -> None:
        tending = asyncio.create_task(self._tend(worker), name="tend")
        try:
            await super().reading(worker, source)
        finally:
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)
        while worker.burials.first is not None:
            await worker.burials._bury_left()

    async def _tend(self, worker: DispatchWorker) -> None:
        while True:
            for _ in range(self.rng.randint(1, 60)):
                await asyncio.sleep(0)
            if worker.burials.first is not None:
                with contextlib.suppress(BrokerError):
                    await worker.burials._bury_left()

    async def run(self) -> None:
        for _ in range(2):
            await self.torment(self.rng.randint(1, 4))
        self.broker.calm = True
        await self.process(self.worker())
        while self.broker.later.pending:
            self.broker.later.fire(self.rng.choice(sorted(self.broker.later.pending)))
        await self.process_due()

    @property
    def buried(self) -> set[str]:
        """The events that have a letter."""
        return {json.loads(payload)["id"] for payload in self.broker.letters.values()}

    def faults(self) -> list[str]:
        """As others. Whoever has a letter need not be sent."""
        self.lost |= self.buried
        found = super().faults()
        if at_once := self.buried - self.later:
            found.append(f"{sorted(at_once)} were due, and have letters")
        return found
