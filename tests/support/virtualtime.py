"""An event loop whose clock jumps to the next thing that is due: hours of waiting run in moments, always in the same order."""

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Never waits. Whoever waits for something that no task of it will ever do is an error."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1_000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def skip(timeout: float | None) -> Any:
            if timeout is None:
                raise RuntimeError("nobody will ever go on")
            self._now += timeout
            return select(0)

        selector.select = skip

    def time(self) -> float:
        return self._now


def run_virtually(work: Coroutine[Any, Any, T], monkeypatch: pytest.MonkeyPatch, *modules: str) -> T:
    """Run `work` in virtual time, which `modules` then take for the monotonic clock; the result is what it returns."""
    loop = VirtualLoop()
    clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(f"{module}.time", clock)
        try:
            return loop.run_until_complete(work)
        finally:
            loop.close()
