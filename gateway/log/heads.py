"""The newest record of many users at once: one `multi_last` per partition in flight, for all that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from engine.broker.jetstream import Broker
from engine.limits import HEADS_SUBJECTS_MAX
from gateway.join.port import LogState
from gateway.limits import HEADS_CHECK_PAUSE_SECONDS, READ_SECONDS
from gateway.log.watch import Watch
from gateway.questions import Questions

USERS_MAX: Final = HEADS_SUBJECTS_MAX - 1
"""Users of one question; the anchor is asked along."""


class Head(NamedTuple):
    """The newest sequence of a user (0: none), how far the replica had come, and the leader's state."""

    seq: int
    up_to: int
    state: LogState


class Heads:
    """Reads heads of one partition.

    Args:
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
        self._turn = asyncio.Lock()
        self._opening = Questions(f"heads-{stream}", self._open, most=USERS_MAX, turn=self._turn)
        gather = HEADS_CHECK_PAUSE_SECONDS
        self._checks = Questions(
            f"heads-check-{stream}", self._check, most=USERS_MAX, gather_seconds=gather, turn=self._turn
        )
        self.requests = 0

    def opening(self, subject: str, answer: Callable[[Head | None], None]) -> None:
        """The head as any replica sees it, with the watch's last answer. A device waits for it."""
        self._opening.ask(subject, answer)

    def check(self, subject: str, answer: Callable[[Head | None], None]) -> None:
        """The head as any replica sees it, with a state the leader was asked for after this call and before the read.

        Nobody waits for it: a quarter of a second's checks share a read.
        """
        self._checks.ask(subject, answer)

    async def close(self) -> None:
        """Stop reading; who still waits is told that there is no answer."""
        await self._opening.close()
        await self._checks.close()

    async def _open(self, subjects: list[str]) -> list[Head]:
        return await self._read(subjects, fresh=False)

    async def _check(self, subjects: list[str]) -> list[Head]:
        return await self._read(subjects, fresh=True)

    async def _read(self, subjects: list[str], *, fresh: bool) -> list[Head]:
        state = (None if fresh else self._watch.last) or await self._watch.state()
        if state is None:
            return []
        self.requests += 1
        asked = [*set(subjects), self._anchor]
        heads = await self._broker.last_by_subjects(self._stream, asked, timeout_seconds=READ_SECONDS)
        return [Head(heads.seqs.get(subject, 0), heads.up_to, state) for subject in subjects]
