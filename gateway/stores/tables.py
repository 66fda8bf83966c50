"""The projections in PostgreSQL as a gateway reads them: within a deadline, or not at all.

Sessions live without them. After a failure PostgreSQL is left alone for a while, so a database that is away costs a
joining device its snapshot and hardly any time: it gets what the log holds. No more than a few hundred sessions wait for
an answer at a time; any other is closed and shall come back. What was not read is never taken for empty (ADR 0020).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, Final, TypeVar

import structlog

from engine.errors import StoreUnavailable
from engine.postgres import Pool, lazy_pool
from engine.tasks import Tasks
from projections.inbox.queries import InboxQueries, Page
from projections.inbox.transactions import Transactions
from projections.proof import Proofs
from seamark.protocol.cursor import Cursor

_log = structlog.get_logger("seamark.tables")

POOL_CONNECTIONS: Final = 8
"""Questions at a time of one process: each takes a millisecond or two."""

CONNECT_SECONDS: Final = 2.0

PAUSE_SECONDS: Final = 2.0
"""After a failure no session waits for PostgreSQL this long."""

WAITING_MAX: Final = 500
"""Sessions that wait for an answer; the next one is told that there are too many, and closed with 1013."""


class NotRead(Enum):
    """Why there is no answer."""

    AWAY = "away"
    """PostgreSQL does not answer, or cannot hold what was asked for. Go on without it."""

    TOO_MANY = "too many"
    """Too many wait for an answer: ask again later."""


Found = TypeVar("Found")


class Tables:
    """The tables of one database; made by `open_tables`."""

    def __init__(self, pool: Pool, partitions: int) -> None:
        self._pool = pool
        self._asking = Tasks()
        self._away_until = 0.0
        self.inbox = InboxQueries(pool, partitions)
        self.proofs = Proofs(pool)
        self.transactions = Transactions(pool)

    def snapshot(self, tenant: str, user: str, answer: Callable[[Page | NotRead], None]) -> None:
        """The newest rows of a user's inbox; `answer` is called once, never inside this call."""
        self._ask(lambda: self.inbox.snapshot(tenant, user), answer)

    def device_cursor(
        self, tenant: str, user: str, device: str, answer: Callable[[Cursor | NotRead | None], None]
    ) -> None:
        """How far a device has acknowledged its user's log; None when the tables do not know the device.

        `answer` is called once, never inside this call.
        """
        if "\0" in tenant + user:  # text that PostgreSQL cannot hold: its refusal must not pass for its absence
            asyncio.get_running_loop().call_soon(answer, None)
        else:
            self._ask(lambda: self.inbox.device_cursor(tenant, user, device), answer)

    def _ask(
        self, question: Callable[[], Coroutine[Any, Any, Found]], answer: Callable[[Found | NotRead], None]
    ) -> None:
        if time.monotonic() < self._away_until:
            asyncio.get_running_loop().call_soon(answer, NotRead.AWAY)
            return
        if len(self._asking) >= WAITING_MAX:
            asyncio.get_running_loop().call_soon(answer, NotRead.TOO_MANY)
            return
        self._asking.begin(self._answer(question, answer), "tables")

    async def _answer(
        self, question: Callable[[], Coroutine[Any, Any, Found]], answer: Callable[[Found | NotRead], None]
    ) -> None:
        found: Found | NotRead = NotRead.AWAY
        try:
            found = await question()
        except StoreUnavailable as error:
            self._away_until = time.monotonic() + PAUSE_SECONDS
            _log.warning("tables_not_read", error=str(error))
        except Exception:
            _log.exception("tables_not_read")
        finally:
            answer(found)

    async def close(self) -> None:
        """Give up what is under way and drop the connections."""
        await self._asking.end()
        self._pool.terminate()


async def open_tables(url: str, partitions: int) -> Tables:
    """The tables of the database at `url`; connects when first asked, so that a gateway starts without PostgreSQL."""
    pool = await lazy_pool(url, POOL_CONNECTIONS, connect_seconds=CONNECT_SECONDS, statement_seconds=CONNECT_SECONDS)
    return Tables(pool, partitions)
