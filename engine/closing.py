"""What a process holds open, and closes at its end."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Protocol, TypeVar


class Closing(Protocol):
    """What is closed when nobody needs it any more."""

    async def close(self) -> None: ...


One = TypeVar("One", bound=Closing)


class Held(AsyncExitStack):
    """An AsyncExitStack that takes what has a `close`."""

    def keep(self, one: One) -> One:
        """`one`, which is closed at the end, before whatever was kept earlier."""
        self.push_async_callback(one.close)
        return one
