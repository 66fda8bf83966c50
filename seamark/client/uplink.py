"""What a device sends besides `hello`: acks (coalesced), read marks and token refreshes, over changing sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from seamark.client.errors import ClientError, UserChanged
from seamark.client.marks import READ_IDS_WAITING_MAX, Lost, Marks
from seamark.client.receiver import Position
from seamark.client.session import Session, Timing
from seamark.client.token import TokenSource
from seamark.protocol.events import is_event_id
from seamark.protocol.frames import Ack, ErrorFrame, RecordFrame, Refresh, ResetFrame

log = logging.getLogger("seamark.client")

REFRESH_RETRY_SECONDS: Final = 5.0

_NOT_NOW: Final = frozenset({"too_many_reads", "unavailable"})
"""Codes of error frames that leave a read mark to be said again."""


class Uplink:
    """Keeps what is to be said until a session stands, and says it in the terms of that session.

    Cursors belong to a generation, which every reset raises: one of an earlier generation names a position that this
    session was never sent, and a gateway takes that for a bad frame. Such acks are dropped.

    Args:
        position: how far the log was received, where it is known.
        on_lost: is told of read marks that are given up.
    """

    def __init__(
        self,
        token: TokenSource,
        timing: Timing,
        position: Callable[[], Position | None],
        on_lost: Callable[[Lost], None],
    ) -> None:
        self.generation = 0
        self.marks = Marks()
        self._token = token
        self._timing = timing
        self._position = position
        self._on_lost = on_lost
        self._coming: Session | None = None
        self._session: Session | None = None
        self._is_live = False
        self._ack: tuple[int, str] | None = None
        self._ack_due = asyncio.Event()
        self._marks_due = asyncio.Event()

    # -- what happens to the session -----------------------------------------------------------------------------------

    def begins(self, session: Session) -> None:
        """`session` is about to connect; nothing is said on it before it stands."""
        self._coming = session

    def stands(self) -> None:
        """The session has a position (it resumed, or its reset came): from now on things can be said on it."""
        self._session = self._coming
        self._ack_due.set()

    def reset(self, frame: ResetFrame) -> None:
        """Cursors from before no longer mean anything to the gateway."""
        self.generation += 1
        self.stands()
        self._tell(self.marks.reset(frame.reason, frame.inbox))

    async def live(self) -> None:
        """The session has caught up, so it is known which marks the log holds: those it has not shown were not stored."""
        if not self._is_live:
            self._is_live = True
            self.marks.again()
        await self._say_marks()

    def shown(self, frame: RecordFrame) -> None:
        """A record of the log: it may say what was marked."""
        if self.marks:
            self.marks.shown(bytes(frame.record))

    def refused(self, frame: ErrorFrame) -> None:
        """An error frame came."""
        if frame.code in _NOT_NOW:
            self.marks.refused(frame.id)
        elif frame.code == "stale_cursor":
            self._tell(self.marks.stale(frame.id))

    def _tell(self, lost: Lost | None) -> None:
        if lost is not None:
            self._on_lost(lost)

    def ended(self) -> None:
        """The session is over; what comes now waits for the next."""
        self._coming = self._session = None
        self._is_live = False

    # -- acks ----------------------------------------------------------------------------------------------------------

    def ack(self, generation: int, cursor: str) -> None:
        """Everything up to `cursor` is done; goes out within `ack_seconds`, and again on the next session if lost."""
        self._ack = (generation, cursor)
        self._ack_due.set()

    async def flush(self) -> None:
        """Say what is due now, if a session stands: nothing will be said later."""
        await self._say_marks()
        await self.flush_ack()

    async def flush_ack(self) -> bool:
        """Send the ack that is due, if there is one and a session stands."""
        if self._ack is None or self._session is None:
            return False
        generation, cursor = self._ack
        return generation == self.generation and await self._session.send(Ack(cursor=cursor))

    async def tend_acks(self) -> None:
        """Send acks while a session runs: the newest one, at most one in `ack_seconds`."""
        while True:
            await self._ack_due.wait()
            self._ack_due.clear()
            if await self.flush_ack():
                await asyncio.sleep(self._timing.ack_seconds)

    # -- read marks ----------------------------------------------------------------------------------------------------

    def read_ids(self, ids: Sequence[str]) -> None:
        """Mark these ids as read. They are kept until the log shows it.

        Raises:
            ClientError: more than 1000 ids that the log has not shown yet. ValueError: what can be no id.
        """
        if wrong := [id for id in ids if type(id) is not str or not is_event_id(id)]:
            raise ValueError(f"{wrong[0]!r} is no id of a record: 1 to 128 printable ASCII characters without blanks")
        if len(ids) + len(self.marks.ids) > READ_IDS_WAITING_MAX:
            raise ClientError(f"at most {READ_IDS_WAITING_MAX} ids can wait to be stored; use up_to or all=True")
        self.marks.add(ids)
        self._marks_due.set()

    def read_up_to(self, position: Position) -> None:
        """Mark everything up to `position` as read. It is kept until the log shows it."""
        self.marks.reach(position)
        self._marks_due.set()

    async def _say_marks(self) -> None:
        session = self._session
        if session is None or not self._is_live:
            return
        for frame in self.marks.take(self._position()):
            if not await session.send(frame):
                return  # the next session says it

    async def tend_reads(self) -> None:
        """Say what was just marked, while a session runs: at once, and at most once in `ack_seconds`.

        An app may mark record after record, and a client may send 600 frames in a minute.
        """
        while True:
            await self._marks_due.wait()
            self._marks_due.clear()
            await self._say_marks()
            await asyncio.sleep(self._timing.ack_seconds)

    async def tend_marks(self) -> None:
        """Say again what the log does not show, while a session runs."""
        while True:
            await asyncio.sleep(self._timing.mark_seconds)
            if self._is_live:
                self._tell(self.marks.tick())
                await self._say_marks()

    # -- the token -----------------------------------------------------------------------------------------------------

    async def tend_token(self) -> None:
        """Present another token in time, while a session runs."""
        while (delay := self._token.refresh_in_seconds()) is not None:
            await asyncio.sleep(delay)
            try:
                async with asyncio.timeout(self._timing.connect_seconds):
                    token = await self._token.fresh()
            except UserChanged:
                self._token.current = ""  # so the connection asks for a token next, learns it too, and ends
                if self._session is not None:
                    await self._session.leave()
                return
            except Exception as failed:
                # If it stays away the gateway closes with 4401, and the next session asks again.
                log.warning("no token to refresh with: %s", str(failed) or type(failed).__name__)
                await asyncio.sleep(REFRESH_RETRY_SECONDS)
                continue
            if self._session is not None:
                await self._session.send(Refresh(token=token))
