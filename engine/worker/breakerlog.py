"""When breakers of providers opened and closed, as rows of `control_log`: what stopped a channel, though no operator did.

Each process has breakers of its own, so each writes rows of its own. A breaker that opens and closes all the time is written down
as it stands every ten seconds, and not more often.
"""

from __future__ import annotations

import asyncio
import os
import socket
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

import structlog

from engine.controls.log import forget_old
from engine.errors import StoreUnavailable
from engine.postgres import Pool, asking

_log = structlog.get_logger("seamark.worker")

PAUSE_SECONDS: Final = 10.0
"""Between two rows of one process about one provider. After a failure of PostgreSQL it is tried again after so long, too."""

PROVIDERS_MAX: Final = 1_000
"""Whose changes wait for PostgreSQL: more than a providers' file has."""

_WRITE: Final = """
INSERT INTO control_log (id, number, at, who, why, action, after)
VALUES ($1, 0, $2, $3, $4, $5, jsonb_build_object('provider', $6::text)) ON CONFLICT (id) DO NOTHING
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
        self._written: dict[str, State] = {}
        self._wanted = asyncio.Event()

    def note(self, provider: str, state: State, why: str) -> None:
        """A breaker has opened because of `why`, or closed."""
        if provider in self._new or len(self._new) < PROVIDERS_MAX:
            self._new[provider] = _Said(state, why, datetime.now(UTC))
            self._wanted.set()

    async def run(self) -> None:
        """Write until cancelled. What PostgreSQL does not take now is tried again, unless it has changed since."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            said, self._new = self._new, {}
            try:
                await self._write(said)
            except StoreUnavailable as error:
                self._new = said | self._new
                self._wanted.set()
                _log.warning("breakers_not_written_down", error=type(error).__name__)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _write(self, said: dict[str, _Said]) -> None:
        async with asking(self._pool) as connection:
            for provider, one in said.items():
                if self._written.get(provider, "closed") == one.state:
                    continue  # it has opened and closed in between
                # Written again by this process it has the same name, and stands there once.
                id = f"breaker/{self._who}/{provider}/{one.at.isoformat()}"
                await connection.execute(
                    _WRITE, id, one.at, self._who, one.why or "it works again", f"breaker {one.state}", provider
                )
                self._written[provider] = one.state
            await forget_old(connection)
