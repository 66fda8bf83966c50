"""What a device sends besides `hello`: acks (coalesced), read marks and token refreshes, over changing sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from seamark.client.errors import ClientError
from seamark.client.frames import encode
from seamark.client.session import Session, Timing
from seamark.client.token import TokenSource

log = logging.getLogger("seamark.client")

READ_IDS_MAX: Final = 200
"""Ids in one `read` frame: 200 ids of 128 bytes stay well below the 64 KiB a gateway accepts in a frame."""

READ_IDS_WAITING_MAX: Final = 1000
"""Ids marked while no session stands, or in one call: five frames. A gateway appends only a few at a time."""

REFRESH_RETRY_SECONDS: Final = 5.0


class Uplink:
    """Keeps what is to be said until a session stands, and says it in the terms of that session.

    Cursors belong to a generation, which every reset raises: one of an earlier generation names a position that this
    session was never sent, and a gateway takes that for a bad frame. Such acks and marks are dropped.
    """

    def __init__(self, token: TokenSource, timing: Timing) -> None:
        self.generation = 0
        self._token = token
        self._timing = timing
        self._coming: Session | None = None
        self._session: Session | None = None
        self._ack: tuple[int, str] | None = None
        self._ack_due = asyncio.Event()
        self._waiting_ids: dict[str, None] = {}
        self._waiting_up_to: str | None = None

    def reset(self) -> None:
        """Cursors from before no longer mean anything to the gateway."""
        self.generation += 1
        if self._waiting_up_to is not None:
            log.warning("a read mark from before the reset was dropped")
            self._waiting_up_to = None

    def begins(self, session: Session) -> None:
        """`session` is about to connect; nothing is said on it before it stands."""
        self._coming = session

    async def stands(self) -> None:
        """The session has a position (it resumed, or its reset came): from now on things can be said on it."""
        self._session = self._coming
        self._ack_due.set()
        ids, up_to = list(self._waiting_ids), self._waiting_up_to
        self._waiting_ids, self._waiting_up_to = {}, None
        if up_to is not None:
            await self.read_up_to(up_to)
        if ids:
            await self._say_ids(ids)  # they were within the bound when they were given

    def ended(self) -> None:
        """The session is over; what comes now waits for the next."""
        self._coming = self._session = None

    def ack(self, generation: int, cursor: str) -> None:
        """Everything up to `cursor` is done; goes out within `ack_seconds`, and again on the next session if lost."""
        self._ack = (generation, cursor)
        self._ack_due.set()

    async def read_ids(self, ids: Sequence[str]) -> None:
        """Mark these ids as read, now or when a session stands.

        Raises:
            ClientError: more than 1000 ids at once, or waiting.
        """
        if len(ids) + len(self._waiting_ids) > READ_IDS_WAITING_MAX:
            raise ClientError(f"at most {READ_IDS_WAITING_MAX} ids can be marked at a time; use up_to or all=True")
        await self._say_ids(ids)

    async def _say_ids(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), READ_IDS_MAX):
            chunk = ids[start : start + READ_IDS_MAX]
            if self._session is None or not await self._session.send(encode("read", ids=list(chunk))):
                self._waiting_ids.update(dict.fromkeys(chunk))

    async def read_up_to(self, cursor: str) -> None:
        """Mark everything up to `cursor` as read, now or when a session stands."""
        if self._session is None or not await self._session.send(encode("read", up_to=cursor)):
            self._waiting_up_to = cursor

    async def flush_ack(self) -> bool:
        """Send the ack that is due, if there is one and a session stands."""
        if self._ack is None or self._session is None:
            return False
        generation, cursor = self._ack
        return generation == self.generation and await self._session.send(encode("ack", cursor=cursor))

    async def tend_acks(self) -> None:
        """Send acks while a session runs: the newest one, at most one in `ack_seconds`."""
        while True:
            await self._ack_due.wait()
            self._ack_due.clear()
            if await self.flush_ack():
                await asyncio.sleep(self._timing.ack_seconds)

    async def tend_token(self) -> None:
        """Present another token in time, while a session runs."""
        while (delay := self._token.refresh_in_seconds()) is not None:
            await asyncio.sleep(delay)
            try:
                async with asyncio.timeout(self._timing.connect_seconds):
                    token = await self._token.next()
            except Exception as failed:
                # If it stays away the gateway closes with 4401, and the next session asks again.
                log.warning("no token to refresh with: %s", str(failed) or type(failed).__name__)
                await asyncio.sleep(REFRESH_RETRY_SECONDS)
                continue
            if self._session is not None:
                await self._session.send(encode("refresh", token=token))
