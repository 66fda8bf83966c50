"""Questions that many ask at once, asked of a server once for all of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar, Generic, TypeVar

import structlog

from engine.tasks import end, end_if_cancelled
from seamark.protocol.errors import SeamarkError

_log = structlog.get_logger("seamark.questions")

Question = TypeVar("Question")
Answer = TypeVar("Answer")


_Asked = tuple[Question, asyncio.Future[Answer] | None, Callable[[Answer | None], None]]
"""A question, and who gets the answer: the waiter, or without one the callback, which stands last. A plain tuple: to make an
object with named fields would take as long as all else that is done for a question."""


def _wanted(asked: _Asked[Question, Answer]) -> bool:
    """Whether somebody still wants to know."""
    return asked[1] is None or not asked[1].done()


def _tell_nobody(_: object) -> None: ...


class Questions(Generic[Question, Answer]):
    """Questions of one kind; one request at a time answers those that came before it was sent.

    One that comes alone is asked at once. While a request is under way, questions are gathered for the next one.

    Args:
        name: of what is asked, for the log.
        ask: the answers to these questions, in their order, or none at all.
        seconds: a request's deadline; whoever asks waits for two of them at most. None: it has one of its own.
        most: how many questions one request may hold.
        gather_seconds: how long questions are gathered even if no request is under way; for those that nobody waits for.
        turns: how many turns of the loop questions are gathered for after a request. Where the loop has nothing else to do they
            are over at once; where it is busy, few requests answer many.
        turn: shared with questions of other kinds, of which no request may be under way at the same time.
    """

    pause_seconds: ClassVar[float] = 0.0
    pause_seconds_max: ClassVar[float] = 0.0
    """How long questions are gathered after a request, for each but one that it has answered, and at most."""

    def __init__(
        self,
        name: str,
        ask: Callable[[list[Question]], Awaitable[Sequence[Answer]]],
        *,
        seconds: float | None = None,
        most: int = sys.maxsize,
        gather_seconds: float = 0.0,
        turns: int = 1,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self._name = name
        self._ask = ask
        self._seconds = seconds
        self._most = most
        self._gather_seconds, self._turns = gather_seconds, turns
        self._turn = turn or asyncio.Lock()
        self._waiting: list[_Asked[Question, Answer]] = []
        self._wave: list[_Asked[Question, Answer]] = []
        self._request: asyncio.Timeout | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is under way, or about to be."""
        return self._asking is not None

    def ask(self, question: Question, answer: Callable[[Answer | None], None]) -> None:
        """`answer` is called exactly once, never inside this call; with None where there is none to be had, which is logged."""
        self._add((question, None, answer))

    async def answer(self, question: Question) -> Answer:
        """The answer. A request of which everybody has given up waiting is given up, too.

        Raises:
            whatever asking raises; ConnectionError: closed meanwhile.
        """
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._add((question, waiter, _tell_nobody))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled() and self._request is not None and not any(map(_wanted, self._wave)):
                request, self._request = self._request, None
                if not request.expired():  # else its deadline has just ended it, and it cannot be moved any more
                    request.reschedule(0)
            raise

    async def close(self) -> None:
        """Stop asking; who still waits gets no answer."""
        await end(self._asking)
        waiting, self._waiting = self._waiting, []
        self._tell(waiting, (), ConnectionError(f"{self._name} is asked no more"))

    def _add(self, asked: _Asked[Question, Answer]) -> None:
        self._waiting.append(asked)
        if self._asking is None:
            self._asking = asyncio.create_task(self._run(), name=self._name)

    async def _run(self) -> None:
        try:
            while self._waiting:
                end_if_cancelled()
                if self._gather_seconds:
                    await asyncio.sleep(self._gather_seconds)
                async with self._turn:
                    wave, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                    await self._settle([*filter(_wanted, wave)])
                for _ in range(self._turns - 1):
                    await asyncio.sleep(0)
                await asyncio.sleep(min(self.pause_seconds_max, self.pause_seconds * (len(wave) - 1)))
        finally:
            self._asking = None

    async def _settle(self, wave: list[_Asked[Question, Answer]]) -> None:
        answers: Sequence[Answer] = ()
        failure: Exception = ConnectionError(f"{self._name}: no answer")
        try:
            async with asyncio.timeout(self._seconds) as self._request:
                self._wave = wave
                answers = await self._ask([question for question, _, _ in wave]) if wave else ()
        except Exception as error:
            # Whoever asks next waits for this task: an unforeseen error must not end it.
            failure = error
            if any(waiter is None for _, waiter, _ in wave):
                self._say(error)
            if isinstance(error, TimeoutError) and self._seconds is not None and any(map(_wanted, wave)):
                # Whom the next request has no room for would wait for it, too, and the last of thousands for all before him.
                self._waiting, behind = self._waiting[: self._most], self._waiting[self._most :]
                self._tell(behind, (), error)
        finally:
            self._request, self._wave = None, []  # whoever has asked is not held until somebody asks again
            self._tell(wave, answers, failure)

    def _say(self, error: Exception) -> None:
        if isinstance(error, SeamarkError | TimeoutError):
            _log.warning("question_not_answered", question=self._name, error=f"{type(error).__name__}: {error}")
        else:
            _log.error("question_failed", question=self._name, exc_info=error)

    def _tell(self, wave: list[_Asked[Question, Answer]], answers: Sequence[Answer], failure: Exception) -> None:
        answered = len(answers)
        for number, (_, waiter, told) in enumerate(wave):
            if waiter is None:
                self._call(told, answers[number] if number < answered else None)
            elif waiter.done():
                continue
            elif number < answered:
                waiter.set_result(answers[number])
            else:
                waiter.set_exception(failure)

    def _call(self, told: Callable[[Answer | None], None], answer: Answer | None) -> None:
        try:
            told(answer)
        except Exception:
            # It must not end this task: others wait for their answers, and whoever asks next waits for the task.
            _log.exception("answer_not_taken", question=self._name)
