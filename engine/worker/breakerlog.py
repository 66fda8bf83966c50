"""When breakers of providers opened and closed, as rows of `control_log`: what stopped a channel, though no operator did.

Each process has breakers of its own, so each writes rows of its own. A breaker that opens and closes all the time is written down
as it stands every ten seconds, and not more often. When a process ends, its breakers are gone: it writes them down as closed, and
others do so for a process that was killed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

import structlog

from engine.controls.log import forget_old
from engine.errors import StoreUnavailable
from engine.postgres import Pool, asking
from engine.tasks import set_or_after

_log = structlog.get_logger("seamark.worker")

PAUSE_SECONDS: Final = 10.0
"""Between two rows of one process about one provider. After a failure of PostgreSQL it is tried again after so long, too."""

KEEP_SECONDS: Final = 300.0
"""How often a process writes down that a breaker is still open."""

GONE_SECONDS: Final = 900.0
"""A process that has not done so for so long is gone, and another one ends what it has left open."""

LEAVE_SECONDS: Final = 2.0
"""How long a process that ends tries to write its breakers down as closed."""

PROVIDERS_MAX: Final = 1_000
"""Whose changes wait for PostgreSQL: more than a providers' file has."""

_WRITE: Final = """
INSERT INTO control_log (id, number, at, who, why, action, after)
VALUES ($1, 0, $2, $3, $4, $5, jsonb_build_object('provider', $6::text)
    || CASE WHEN $5 = 'breaker open' THEN jsonb_build_object('open_at', now()) ELSE '{}' END)
ON CONFLICT (id) DO NOTHING
"""

# `open_at`: when its process has last said that it is open. A process that was killed says so no more. One of an older version
# never does: nobody knows whether it lives.
_KEEP: Final = "UPDATE control_log SET after = after || jsonb_build_object('open_at', now()) WHERE id = ANY ($1)"

_END_GONE: Final = """
INSERT INTO control_log (id, number, at, who, why, action, after)
SELECT o.id || '/gone', 0, now(), o.who, 'its worker is gone', 'breaker closed', o.after - 'open_at'
FROM control_log o
WHERE o.action = 'breaker open' AND o.at > now() - interval '30 days'
    AND (o.after->>'open_at')::timestamptz < now() - make_interval(secs => $1)
    AND NOT EXISTS (
        SELECT FROM control_log n WHERE n.at > o.at AND n.who = o.who
            AND n.action IN ('breaker open', 'breaker closed') AND n.after->>'provider' = o.after->>'provider'
    )
ON CONFLICT (id) DO NOTHING
"""

State = Literal["open", "closed"]


class _Said(NamedTuple):
    state: State
    why: str
    at: datetime


class BreakerLog:
    """Writes down changes of breakers, as it hears of them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._who = f"worker {os.getpid()} on {socket.gethostname()}"
        self._new: dict[str, _Said] = {}
        self._open: dict[str, str] = {}  # by provider, the id of the row that says so
        self._wanted = asyncio.Event()
        self._well_since = time.monotonic()

    def note(self, provider: str, state: State, why: str) -> None:
        """A breaker has opened because of `why`, or closed."""
        if provider in self._new or len(self._new) < PROVIDERS_MAX:
            self._new[provider] = _Said(state, why, datetime.now(UTC))
            self._wanted.set()

    async def run(self) -> None:
        """Write until cancelled. What PostgreSQL does not take now is tried again, unless it has changed since."""
        try:
            while True:
                await set_or_after(self._wanted, KEEP_SECONDS)
                said, self._new = self._new, {}
                try:
                    await self._write(said)
                except StoreUnavailable as error:
                    self._new = said | self._new
                    self._wanted.set()
                    self._well_since = time.monotonic()
                    _log.warning("breakers_not_written_down", error=type(error).__name__)
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            await self._leave()

    async def _write(self, said: dict[str, _Said]) -> None:
        async with asking(self._pool) as connection:
            for provider, one in said.items():
                if (provider in self._open) == (one.state == "open"):
                    continue  # it has opened and closed in between
                # Written again by this process it has the same name, and stands there once.
                id = f"breaker/{self._who}/{provider}/{one.at.isoformat()}"
                await connection.execute(
                    _WRITE, id, one.at, self._who, one.why or "it works again", f"breaker {one.state}", provider
                )
                if one.state == "open":
                    self._open[provider] = id
                else:
                    del self._open[provider]
            if self._open:
                await connection.execute(_KEEP, list(self._open.values()))
            # While PostgreSQL was away, processes that live could not say so either.
            if time.monotonic() - self._well_since >= GONE_SECONDS:
                await connection.execute(_END_GONE, GONE_SECONDS)
            await forget_old(connection)

    async def _leave(self) -> None:
        """Write down that the breakers of this process are closed. If that cannot be, others do it later (`_END_GONE`)."""
        now = datetime.now(UTC)
        said = {provider: _Said("closed", "its worker has ended", now) for provider in self._open}
        if not said:
            return
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._write(said)
        except (StoreUnavailable, TimeoutError) as error:
            _log.warning("breakers_not_written_down", error=type(error).__name__)
