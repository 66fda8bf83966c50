"""The newest record of many users at once: one `multi_last` per partition in flight, for all that wait.

The window adapts by itself: while one request is under way, and the longer after it the more sessions shared it, the next
one fills, up to a thousand subjects. A session that comes alone is asked for at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from gateway.join.port import LogState
from gateway.limits import HEADS_CHECK_PAUSE_SECONDS, HEADS_SUBJECTS, READ_SECONDS, shared_pause_seconds
from gateway.log.watch import Watch

_log = structlog.get_logger("seamark.heads")

Answer = Callable[[int, int, LogState | None], None]
"""Gets the newest sequence (0: none), how far the replica had come, and the leader's state; no state: no answer."""

Asked = list[tuple[str, Answer]]


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
        self._opening: Asked = []
        self._checks: Asked = []
        self._opening_task: asyncio.Task[None] | None = None
        self._checks_task: asyncio.Task[None] | None = None
        self._in_flight = asyncio.Lock()
        self.requests = 0

    def opening(self, subject: str, answer: Answer) -> None:
        """The head as any replica sees it, with the watch's last answer. A device waits for it."""
        self._opening.append((subject, answer))
        if self._opening_task is None:
            self._opening_task = asyncio.create_task(self._open(), name=f"heads-{self._stream}")

    def check(self, subject: str, answer: Answer) -> None:
        """The head as any replica sees it, with a state the leader was asked for after this call and before the read.

        Nobody waits for it: a quarter of a second's checks share a read.
        """
        self._checks.append((subject, answer))
        if self._checks_task is None:
            self._checks_task = asyncio.create_task(self._check(), name=f"heads-check-{self._stream}")

    async def close(self) -> None:
        """Stop reading; who still waits is told that there is no answer."""
        tasks = [task for task in (self._opening_task, self._checks_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        waiting, self._opening, self._checks = self._opening + self._checks, [], []
        _tell(waiting, None)

    async def _open(self) -> None:
        try:
            while self._opening:
                async with self._in_flight:
                    wave, self._opening = self._opening[:HEADS_SUBJECTS], self._opening[HEADS_SUBJECTS:]
                    await self._read(wave, fresh=False)
                await asyncio.sleep(shared_pause_seconds(len(wave)))
        finally:
            self._opening_task = None

    async def _check(self) -> None:
        try:
            while self._checks:
                await asyncio.sleep(HEADS_CHECK_PAUSE_SECONDS)
                async with self._in_flight:
                    wave, self._checks = self._checks[:HEADS_SUBJECTS], self._checks[HEADS_SUBJECTS:]
                    await self._read(wave, fresh=True)
        finally:
            self._checks_task = None

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
        except Exception:
            # The next wave waits for this task: an unforeseen error must not end it.
            _log.exception("reading heads failed, it goes on", stream=self._stream)
        finally:
            _tell(wave, None)


def _tell(wave: list[tuple[str, Answer]], state: LogState | None) -> None:
    for _, answer in wave:
        answer(0, 0, state)
