"""Unread counts of one partition's users, in Redis: read together for all that join at the time.

The projector tells changes on the users' live subjects, where a message may be lost. So a count is read after the
subscription is confirmed, and every 30 s for all that are connected; who was told another one is told again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from engine.errors import StoreUnavailable
from gateway.limits import COUNT_SECONDS
from gateway.questions import Questions
from projections.unread.reader import UnreadReader, shown
from seamark.protocol.frames import Unread, unread_frame

_log = structlog.get_logger("seamark.counts")

USERS_MAX: Final = 256
"""Users of one question: a millisecond of Redis's time."""

PAUSE_SECONDS: Final = 1.0
"""After a failure Redis is left alone this long: nobody who joins waits for it meanwhile."""

unread_in = msgspec.json.Decoder(Unread).decode
"""The count in a frame `unread`."""


class Counts:
    """Reads the unread counts of one partition.

    Args:
        queries: the projections; None: there are none, every answer is None.
        epoch: the log's incarnation as far as it is known: a count of another one is stale.
    """

    def __init__(self, queries: UnreadReader | None, partition: int, epoch: Callable[[], str | None]) -> None:
        self._queries = queries
        self._partition = partition
        self._epoch = epoch
        self._questions = Questions(f"counts-{partition}", self.read, most=USERS_MAX)
        self._away_until = 0.0

    @property
    def readable(self) -> bool:
        """There are counts to be read."""
        return self._queries is not None

    def ask(self, user: str, answer: Callable[[Unread | None], None]) -> None:
        """The count of `user` (`<tenant>.<user>`, as tokens), or None; `answer` is called once, never inside this call.

        Whether Redis answers or not, it is called within a quarter of a second.
        """
        if self._queries is None or time.monotonic() < self._away_until:
            asyncio.get_running_loop().call_soon(answer, None)
        else:
            self._questions.ask(user, answer)

    async def read(self, users: list[str]) -> list[Unread]:
        """The counts of up to `USERS_MAX` users of this partition; empty when they cannot be read now."""
        if self._queries is None or time.monotonic() < self._away_until:
            return []
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                counts = await self._queries.unread_of(self._partition, users)
        except (StoreUnavailable, TimeoutError) as error:
            self._away_until = time.monotonic() + PAUSE_SECONDS
            _log.warning("counts_not_read", partition=self._partition, error=f"{type(error).__name__}: {error}")
            return []
        epoch = self._epoch()
        return [shown(unread, stale=unread.as_of.epoch != epoch) for unread in counts]

    async def close(self) -> None:
        """Stop reading; who still waits gets no count."""
        await self._questions.close()


def differs(frame: bytes, count: Unread) -> bool:
    """Whether a count says something else than the frame sent last, but for how far it is counted."""
    return msgspec.structs.replace(unread_in(frame), as_of=count.as_of) != count


def as_of(frame: bytes) -> int:
    """The position a frame `unread` is valid at; -1 when it names none."""
    start = frame.find(b'"as_of":')
    if start < 0:
        return -1
    end = start + 8
    while frame[end : end + 1].isdigit():
        end += 1
    return int(frame[start + 8 : end]) if end > start + 8 else -1


def marked_stale(frame: bytes) -> bytes | None:
    """The frame with its count marked as stale; None when it was."""
    last = unread_in(frame)
    return None if last.stale else unread_frame(msgspec.structs.replace(last, stale=True))
