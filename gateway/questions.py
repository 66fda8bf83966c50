"""Questions that many sessions ask at once, asked of a server once for all of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, repeat
from typing import Generic, TypeVar

import structlog

from engine.tasks import end, end_if_cancelled
from gateway.limits import SHARED_PAUSE_SECONDS, SHARED_PAUSE_SECONDS_MAX
from seamark.protocol.errors import SeamarkError

_log = structlog.get_logger("seamark.questions")

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Questions(Generic[Question, Answer]):
    """Questions of one kind; one request at a time answers those that came before it was sent.

    A session that comes alone is asked for at once. While a request is under way, and the longer after it the more sessions it
    has answered, questions are gathered for the next one.

    Args:
        name: of what is asked, for the log.
        ask: the answers to these questions, in their order, or none at all. What it raises is logged, and all get no answer.
        most: how many questions one request may hold.
        gather_seconds: how long questions are gathered even if no request is under way; for those that nobody waits for.
        turn: shared with questions of other kinds, of which no request may be under way at the same time.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[list[Question]], Awaitable[Sequence[Answer]]],
        *,
        most: int = sys.maxsize,
        gather_seconds: float = 0.0,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self._name = name
        self._ask = ask
        self._most = most
        self._gather_seconds = gather_seconds
        self._turn = turn or asyncio.Lock()
        self._waiting: list[tuple[Question, Callable[[Answer | None], None]]] = []
        self._asking: asyncio.Task[None] | None = None

    def ask(self, question: Question, answer: Callable[[Answer | None], None]) -> None:
        """`answer` is called exactly once, never inside this call; with None where there is no answer to be had."""
        self._waiting.append((question, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Stop asking; who still waits gets no answer."""
        await end(self._asking)
        waiting, self._waiting = self._waiting, []
        for _, answer in waiting:
            answer(None)

    async def _run(self) -> None:
        try:
            while self._waiting:
                end_if_cancelled()
                if self._gather_seconds:
                    await asyncio.sleep(self._gather_seconds)
                async with self._turn:
                    wave, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                    await self._settle(wave)
                await asyncio.sleep(min(SHARED_PAUSE_SECONDS_MAX, SHARED_PAUSE_SECONDS * (len(wave) - 1)))
        finally:
            self._asking = None

    async def _settle(self, wave: list[tuple[Question, Callable[[Answer | None], None]]]) -> None:
        answers: Sequence[Answer] = ()
        try:
            answers = await self._ask([question for question, _ in wave])
        except (SeamarkError, TimeoutError) as error:
            _log.warning("question_not_answered", question=self._name, error=f"{type(error).__name__}: {error}")
        except Exception:
            # Whoever asks next waits for this task: an unforeseen error must not end it.
            _log.exception("question_failed", question=self._name)
        finally:
            for (_, answer), known in zip(wave, chain(answers, repeat(None)), strict=False):
                answer(known)
