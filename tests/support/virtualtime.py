"""A loop whose clock jumps to what is due next: nobody waits, and thousands of worlds pass in a minute."""

import asyncio
import selectors


class VirtualTime(asyncio.SelectorEventLoop):
    """The standard loop without anything outside of it. `time()` says how many seconds have passed in it."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_NothingElse(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _NothingElse(selectors.SelectSelector):
    """There are no files: waiting for them is waiting for the next timer."""

    def __init__(self, loop: VirtualTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits for somebody else"
        self._loop.jump(max(0.0, timeout))
        return []
