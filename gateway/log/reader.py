"""Reads of a user's log: pages from any replica, single records from the leader. A few at a time per partition."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import structlog

from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from engine.limits import PAGE_RECORDS
from engine.tasks import Tasks
from gateway.limits import PAGE_BYTES, PAGES_IN_FLIGHT, READ_SECONDS
from gateway.log.message import Message, of_stored

_log = structlog.get_logger("seamark.reader")

Answer = TypeVar("Answer")


class Page(NamedTuple):
    """Records in log order; `more`: the replica holds further ones."""

    messages: list[Message]
    more: bool = False


class Reader:
    """Reads one partition. Each `answer` is called exactly once, with None when nobody answered.

    A sparse cold read walks whole blocks and holds the partition's writers up meanwhile, so a semaphore guards them.
    """

    def __init__(self, broker: Broker, stream: str) -> None:
        self._broker = broker
        self._stream = stream
        self._slots = asyncio.Semaphore(PAGES_IN_FLIGHT)
        self._tasks = Tasks()
        self.requests = 0

    def page(self, subject: str, seq: int, answer: Callable[[Page | None], None]) -> None:
        """Records of `subject` from `seq` on, `seq` included."""

        async def read() -> Page:
            page = await self._broker.next_by_subject(
                self._stream, subject, seq, batch=PAGE_RECORDS, max_bytes=PAGE_BYTES, timeout_seconds=READ_SECONDS
            )
            return Page([of_stored(stored) for stored in page.records], page.more)

        self._begin("page", read, answer)

    def next(self, subject: str, seq: int, answer: Callable[[Page | None], None]) -> None:
        """The leader's first record at or after `seq`, if there is one."""

        async def read() -> Page:
            stored = await self._broker.leader_next(self._stream, subject, seq, timeout_seconds=READ_SECONDS)
            return Page([of_stored(stored)] if stored is not None else [])

        self._begin("next", read, answer)

    def last(self, subject: str, answer: Callable[[int | None], None]) -> None:
        """The leader's newest sequence of `subject`; 0: none."""

        async def read() -> int:
            stored = await self._broker.leader_last(self._stream, subject, timeout_seconds=READ_SECONDS)
            return stored.seq if stored is not None else 0

        self._begin("last", read, answer)

    async def close(self) -> None:
        """Give up the reads under way."""
        await self._tasks.end()

    def _begin(self, what: str, read: Callable[[], Awaitable[Answer]], answer: Callable[[Answer | None], None]) -> None:
        self._tasks.begin(self._answer(what, read, answer), f"read-{what}-{self._stream}")

    async def _answer(
        self, what: str, read: Callable[[], Awaitable[Answer]], answer: Callable[[Answer | None], None]
    ) -> None:
        """One request, in its turn. A failure is logged and not raised: the feed that asked waits for an answer."""
        found: Answer | None = None
        async with self._slots:
            self.requests += 1
            try:
                found = await read()
            except BrokerError as error:
                _log.warning("log_not_read", what=what, stream=self._stream, error=f"{type(error).__name__}: {error}")
            except Exception:
                _log.exception("log_not_read", what=what, stream=self._stream)
        answer(found)
