"""Reads of a user's log: pages from any replica, single records from the leader. A few at a time per partition."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog

from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from gateway.limits import PAGE_BYTES, PAGE_RECORDS, PAGES_IN_FLIGHT, READ_SECONDS
from gateway.log.message import Message, of_stored

_log = structlog.get_logger("seamark.reader")


class Reader:
    """Reads one partition.

    A sparse cold read walks whole blocks and holds the partition's writers up meanwhile, so a semaphore guards them.
    """

    def __init__(self, broker: Broker, stream: str) -> None:
        self._broker = broker
        self._stream = stream
        self._slots = asyncio.Semaphore(PAGES_IN_FLIGHT)
        self._tasks: set[asyncio.Task[None]] = set()
        self.requests = 0

    def page(self, subject: str, seq: int, answer: Callable[[list[Message] | None, bool], None]) -> None:
        """Records of `subject` from `seq` on, `seq` included; None when nobody answered."""
        self._start(self._page(subject, seq, answer), "page")

    def next(self, subject: str, seq: int, answer: Callable[[Message | None, bool], None]) -> None:
        """The leader's first record at or after `seq` and True; False when nobody answered."""
        self._start(self._next(subject, seq, answer), "next")

    def last(self, subject: str, answer: Callable[[int | None], None]) -> None:
        """The leader's newest sequence of `subject` (0: none); None when nobody answered."""
        self._start(self._last(subject, answer), "last")

    async def close(self) -> None:
        """Give up the reads under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None], kind: str) -> None:
        task = asyncio.create_task(work, name=f"read-{kind}-{self._stream}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @asynccontextmanager
    async def _request(self, failure: str) -> AsyncIterator[None]:
        """One request, in its turn. A failure is logged and not raised: the feed that asked waits for an answer."""
        async with self._slots:
            self.requests += 1
            try:
                yield
            except BrokerError as error:
                _log.warning(failure, stream=self._stream, error=f"{type(error).__name__}: {error}")
            except Exception:
                _log.exception("reading failed, it is tried again", stream=self._stream)

    async def _page(self, subject: str, seq: int, answer: Callable[[list[Message] | None, bool], None]) -> None:
        messages: list[Message] | None = None
        more = False
        async with self._request("page_not_read"):
            page = await self._broker.next_by_subject(
                self._stream, subject, seq, batch=PAGE_RECORDS, max_bytes=PAGE_BYTES, timeout_seconds=READ_SECONDS
            )
            messages, more = [of_stored(stored) for stored in page.records], page.more
        answer(messages, more)

    async def _next(self, subject: str, seq: int, answer: Callable[[Message | None, bool], None]) -> None:
        message: Message | None = None
        answered = False
        async with self._request("leader_not_read"):
            stored = await self._broker.leader_next(self._stream, subject, seq, timeout_seconds=READ_SECONDS)
            message, answered = (of_stored(stored) if stored is not None else None), True
        answer(message, answered)

    async def _last(self, subject: str, answer: Callable[[int | None], None]) -> None:
        seq: int | None = None
        async with self._request("leader_not_read"):
            stored = await self._broker.leader_last(self._stream, subject, timeout_seconds=READ_SECONDS)
            seq = stored.seq if stored is not None else 0
        answer(seq)
