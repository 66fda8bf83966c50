"""A loop whose clock jumps to what is due next: nobody waits, hours pass in moments, always in the same order."""

import asyncio
import selectors
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class VirtualTime(asyncio.SelectorEventLoop):
    """The standard loop without anything outside of it. `time()` says how many seconds have passed, beginning with `start`."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
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


def run_virtually(work: Coroutine[Any, Any, T], monkeypatch: pytest.MonkeyPatch, *modules: str) -> T:
    """Run `work` in virtual time, which `modules` then take for the monotonic clock; the result is what it returns."""
    loop = VirtualTime(1_000.0)
    clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(f"{module}.time", clock)
        try:
            return loop.run_until_complete(work)
        finally:
            loop.close()
