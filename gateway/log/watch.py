"""The leader's word on one partition: epoch, first and last sequence.

Asked every 5 s, at once on doubt, and whenever a feed wants to know. One request in flight answers all that asked before
it was sent; who asks later waits for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from engine.broker.jetstream import Broker
from engine.log.incarnations import epoch_of
from engine.tasks import end, set_or_after
from gateway.join.port import LogState
from gateway.limits import READ_SECONDS, WATCH_SECONDS
from gateway.questions import Questions


class Watch:
    """Asks the leader of one partition.

    Args:
        stream: `LOG-<p>`.
        tell: given every periodic answer; it returns when all feeds of the partition have been told. The next periodic
            question is sent only then, so that two answers in a row prove something to a feed.

    Attributes:
        last: the last answer there was.
    """

    def __init__(self, broker: Broker, stream: str, tell: Callable[[LogState], Awaitable[None]]) -> None:
        self._broker = broker
        self._stream = stream
        self._tell = tell
        self._questions = Questions(f"leader-{stream}", self._ask)
        self._doubt = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None
        self.last: LogState | None = None

    def start(self) -> None:
        """Begin to ask every 5 s."""
        self._asking = asyncio.create_task(self._run(), name=f"watch-{self._stream}")

    def ask(self, answer: Callable[[LogState | None], None]) -> None:
        """Ask the leader, with a question sent after this call; `answer` gets None when it does not answer."""
        self._questions.ask(None, answer)

    async def state(self) -> LogState | None:
        """As `ask`, to be awaited."""
        future: asyncio.Future[LogState | None] = asyncio.get_running_loop().create_future()
        self.ask(lambda state: None if future.done() else future.set_result(state))
        return await future

    def doubt(self) -> None:
        """Something may have changed: ask now instead of in a while."""
        self._doubt.set()

    async def close(self) -> None:
        """Stop asking; who still waits is told that nothing is known."""
        await end(self._asking)
        await self._questions.close()

    async def _run(self) -> None:
        while True:
            state = await self.state()
            if state is not None:
                await self._tell(state)
            await set_or_after(self._doubt, WATCH_SECONDS)

    async def _ask(self, questions: list[None]) -> list[LogState]:
        said = await self._broker.stream(self._stream, timeout_seconds=READ_SECONDS)
        state = LogState(epoch_of(said), said.first_seq, said.last_seq)
        if self.last is not None and self.last.epoch != state.epoch:
            self.doubt()
        self.last = state
        return [state] * len(questions)
