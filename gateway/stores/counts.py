"""Unread counts of one partition's users: asked for together by all that join, compared now and then for all that are joined.

The projector tells changes on the users' live subjects, where a message may be lost. So a count is read after the
subscription is confirmed, and every 30 s for all that are connected; who was told another one is told again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from engine.tasks import end_if_cancelled
from gateway.limits import COUNT_SECONDS, COUNTS_EVERY_SECONDS, shared_pause_seconds
from gateway.log.watch import Watch
from projections.queries import Queries, UnreadCount, shown
from projections.store import StoreUnavailable
from seamark.protocol.frames import Unread, unread_frame

if TYPE_CHECKING:
    from gateway.log.live import UserLog

_log = structlog.get_logger("seamark.counts")

USERS_MAX: Final = 256
"""Users of one question: a millisecond of Redis's time."""

PAUSE_SECONDS: Final = 1.0
"""After a failure Redis is left alone this long: nobody who joins waits for it meanwhile."""

Answer = Callable[[Unread | None], None]
"""Gets a count; None when there is none to be had."""

unread_in = msgspec.json.Decoder(Unread).decode
"""The count in a frame `unread`."""


class Counts:
    """Reads the unread counts of one partition.

    Args:
        queries: the projections; None: there are none, every answer is None.
        partition: its number.
        watch: knows the log's incarnation: a count of another one is stale.
        logs: the users joined in this process.
    """

    def __init__(
        self, queries: Queries | None, partition: int, watch: Watch, logs: dict[tuple[str, str], UserLog]
    ) -> None:
        self._queries = queries
        self._partition = partition
        self._watch = watch
        self._logs = logs
        self._waiting: list[tuple[str, Answer]] = []
        self._asking: asyncio.Task[None] | None = None
        self._comparing: asyncio.Task[None] | None = None
        self._suspicion = asyncio.Event()
        self._away_until = 0.0

    def start(self) -> None:
        """Begin to compare."""
        if self._queries is not None:
            self._comparing = asyncio.create_task(self._compare(), name=f"counts-compare-{self._partition}")

    def suspect(self) -> None:
        """Changes may have been missed: compare at once."""
        self._suspicion.set()

    def ask(self, user: str, answer: Answer) -> None:
        """The count of `user` (`<tenant>.<user>`, as tokens); `answer` is called once, never inside this call.

        Whether Redis answers or not, it is called within a quarter of a second.
        """
        if self._queries is None or time.monotonic() < self._away_until:
            asyncio.get_running_loop().call_soon(answer, None)
            return
        self._waiting.append((user, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name=f"counts-{self._partition}")

    async def close(self) -> None:
        """Stop reading; who still waits gets no count."""
        tasks = [task for task in (self._asking, self._comparing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        waiting, self._waiting = self._waiting, []
        for _, answer in waiting:
            answer(None)

    async def _ask(self) -> None:
        wave: list[tuple[str, Answer]] = []
        try:
            while self._waiting:
                end_if_cancelled()
                wave, self._waiting = self._waiting[:USERS_MAX], self._waiting[USERS_MAX:]
                found = await self._read([user for user, _ in wave])
                told, wave = wave, []
                for index, (_, answer) in enumerate(told):
                    answer(self._shown(found[index]) if found else None)
                await asyncio.sleep(shared_pause_seconds(len(told)))
        finally:
            self._asking = None
            for _, answer in wave:
                answer(None)

    async def _read(self, users: list[str]) -> list[UnreadCount]:
        """Empty when there is no count to be had."""
        if self._queries is None or time.monotonic() < self._away_until:
            return []
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                return await self._queries.unread_of(self._partition, users)
        except (StoreUnavailable, TimeoutError) as error:
            self._away_until = time.monotonic() + PAUSE_SECONDS
            _log.warning("counts_not_read", partition=self._partition, error=f"{type(error).__name__}: {error}")
            return []
        except Exception:
            # The sessions that asked wait for an answer: an unforeseen error must not leave them without one.
            _log.exception("reading counts failed, sessions go on without", partition=self._partition)
            return []

    def _shown(self, unread: UnreadCount) -> Unread:
        log = self._watch.last
        return shown(unread, stale=log is None or log.epoch != unread.as_of.epoch)

    async def _compare(self) -> None:
        while True:
            try:
                async with asyncio.timeout(COUNTS_EVERY_SECONDS):
                    await self._suspicion.wait()
            except TimeoutError:
                pass  # the ordinary round
            self._suspicion.clear()
            end_if_cancelled()
            try:
                await self._compare_all()
            except Exception:
                # Without this task a lost change is never noticed; what we did not foresee must not end it.
                _log.exception("comparing counts failed, it goes on")

    async def _compare_all(self) -> None:
        logs = list(self._logs.values())
        for start in range(0, len(logs), USERS_MAX):
            part = logs[start : start + USERS_MAX]
            found = await self._read([log.user for log in part])
            for index, log in enumerate(part):
                log.compare(self._shown(found[index]) if found else None)
            await asyncio.sleep(0)


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
