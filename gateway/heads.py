"""The newest record of many users at once: one `multi_last` per partition in flight, for all that wait.

The window adapts by itself: while one request is under way, and for a moment after it, the next one fills, up to 1000
subjects. A session that comes alone is asked for at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from engine.errors import BrokerError
from engine.jetstream import Broker
from gateway.limits import HEADS_CHECK_PAUSE_SECONDS, HEADS_PAUSE_SECONDS, HEADS_SUBJECTS, READ_SECONDS
from gateway.port import LogState
from gateway.watch import Watch

_log = structlog.get_logger("seamark.heads")

Answer = Callable[[int, int, LogState | None], None]
"""Gets the newest sequence (0: none), how far the replica had come, and the leader's state; no state: no answer."""


class Heads:
    """Reads heads of one partition.

    Args:
        broker: the connection.
        stream: `LOG-<p>`.
        watch: gives the leader's state that goes with a head.
        anchor: a subject that has messages as soon as the stream has: asked along, because an answer without any
            message does not say how far the replica has come, and would have to be taken for a stale one.
    """

    def __init__(self, broker: Broker, stream: str, watch: Watch, anchor: str) -> None:
        self._broker = broker
        self._stream = stream
        self._anchor = anchor
        self._watch = watch
        self._opening: list[tuple[str, Answer]] = []
        self._checks: list[tuple[str, Answer]] = []
        self._task: asyncio.Task[None] | None = None
        self._checked_at = -1e9
        self.requests = 0

    def opening(self, subject: str, answer: Answer) -> None:
        """The head as any replica sees it, with the watch's last answer."""
        self._opening.append((subject, answer))
        self._wake()

    def check(self, subject: str, answer: Answer) -> None:
        """The head as any replica sees it, with a state the leader was asked for after this call and before the read."""
        self._checks.append((subject, answer))
        self._wake()

    async def close(self) -> None:
        """Stop reading; who still waits is told that there is no answer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        waiting, self._opening, self._checks = self._opening + self._checks, [], []
        _tell(waiting, None)

    def _wake(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"heads-{self._stream}")

    async def _run(self) -> None:
        try:
            while self._opening or self._checks:
                # Sessions that open go first: their devices wait; a check only looks for what may be late anyway.
                if self._opening:
                    wave, self._opening = self._opening[:HEADS_SUBJECTS], self._opening[HEADS_SUBJECTS:]
                    await self._read(wave, fresh=False)
                elif self._checks_due():
                    wave, self._checks = self._checks[:HEADS_SUBJECTS], self._checks[HEADS_SUBJECTS:]
                    await self._read(wave, fresh=True)
                    self._checked_at = time.monotonic()
                await asyncio.sleep(HEADS_PAUSE_SECONDS)
        finally:
            self._task = None

    def _checks_due(self) -> bool:
        """Checks can wait for others to share their read."""
        return time.monotonic() - self._checked_at >= HEADS_CHECK_PAUSE_SECONDS or len(self._checks) >= HEADS_SUBJECTS

    async def _read(self, wave: list[tuple[str, Answer]], *, fresh: bool) -> None:
        try:
            state = self._watch.last
            if fresh or state is None:
                state = await self._watch.state()
            if state is None:
                return
            self.requests += 1
            subjects = [*{subject for subject, _ in wave}, self._anchor]
            heads = await self._broker.last_by_subjects(self._stream, subjects, timeout_seconds=READ_SECONDS)
            told, wave = wave, []
            for subject, answer in told:
                answer(heads.seqs.get(subject, 0), heads.up_to, state)
        except BrokerError as error:
            _log.warning("heads_not_read", stream=self._stream, error=f"{type(error).__name__}: {error}")
        finally:
            _tell(wave, None)


def _tell(wave: list[tuple[str, Answer]], state: LogState | None) -> None:
    for _, answer in wave:
        answer(0, 0, state)
