"""The leader's word on one partition: epoch, first and last sequence.

Asked every 5 s, at once on doubt, and whenever a feed wants to know. One request in flight answers all that asked before
it was sent; who asks later waits for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from gateway.join.port import LogState
from gateway.limits import READ_SECONDS, WATCH_SECONDS, shared_pause_seconds

_log = structlog.get_logger("seamark.watch")

Answer = Callable[[LogState | None], None]
"""Gets the leader's state, or None when it could not be had."""


class Watch:
    """Asks the leader of one partition.

    Args:
        broker: the connection.
        stream: `LOG-<p>`.
        tell: given every periodic answer; it returns when all feeds of the partition have been told. The next periodic
            question is sent only then, so that two answers in a row prove something to a feed.
    """

    def __init__(self, broker: Broker, stream: str, tell: Callable[[LogState], Awaitable[None]]) -> None:
        self._broker = broker
        self._stream = stream
        self._tell = tell
        self._waiting: list[Answer] = []
        self._asking: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self.last: LogState | None = None

    def start(self) -> None:
        """Begin to ask every 5 s."""
        self._loop = asyncio.create_task(self._run(), name=f"watch-{self._stream}")

    def ask(self, answer: Answer) -> None:
        """Ask the leader, with a question sent after this call; `answer` is called exactly once."""
        self._waiting.append(answer)
        if self._asking is None:
            self._asking = asyncio.create_task(self._drain(), name=f"watch-ask-{self._stream}")

    def latest(self, answer: Answer) -> None:
        """The last answer there was; the first one is waited for. Never calls back inside this call."""
        if self.last is not None:
            asyncio.get_running_loop().call_soon(answer, self.last)
        else:
            self.ask(answer)

    def doubt(self) -> None:
        """Something may have changed: ask now instead of in a while."""
        self._doubt.set()

    async def state(self) -> LogState | None:
        """As `ask`, to be awaited."""
        future: asyncio.Future[LogState | None] = asyncio.get_running_loop().create_future()

        def answer(state: LogState | None) -> None:
            if not future.done():
                future.set_result(state)

        self.ask(answer)
        return await future

    async def close(self) -> None:
        """Stop asking; who still waits is told that nothing is known."""
        for task in (self._loop, self._asking):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in (self._loop, self._asking) if task is not None), return_exceptions=True)
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer(None)

    async def _run(self) -> None:
        while True:
            state = await self.state()
            if state is not None:
                await self._tell(state)
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._doubt.wait()
            except TimeoutError:
                continue
            finally:
                self._doubt.clear()

    async def _drain(self) -> None:
        waiting: list[Answer] = []
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                state = await self._question()
                if state is not None:
                    if self.last is not None and self.last.epoch != state.epoch:
                        self.doubt()
                    self.last = state
                told, waiting = waiting, []
                for answer in told:
                    answer(state)
                await asyncio.sleep(shared_pause_seconds(len(told)))
        finally:
            self._asking = None
            for answer in waiting:
                answer(None)

    async def _question(self) -> LogState | None:
        try:
            state = await self._broker.stream(self._stream, timeout_seconds=READ_SECONDS)
        except BrokerError as error:
            _log.warning("leader_did_not_answer", stream=self._stream, error=f"{type(error).__name__}: {error}")
            return None
        except Exception:
            _log.exception("asking the leader failed, it is asked again", stream=self._stream)  # all feeds wait for it
            return None
        if state.epoch is None:
            _log.error("stream_without_epoch", stream=self._stream, remedy="run `seamark topology apply`")
            return None
        return LogState(state.epoch, state.first_seq, state.last_seq)
