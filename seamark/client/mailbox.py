"""The bounded queue between the socket and the app."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items in order, bounded by number and by bytes.

    At the bound `put` waits: the socket is read no further, the gateway sees a slow device and lets it catch up from
    the log; a device that stays away too long is closed with 4408 and resumes by its cursor. Nothing is dropped.

    Args:
        items_max: so many items wait at most.
        bytes_max: so many bytes wait at most; one item larger than this is taken when nothing else waits.
    """

    def __init__(self, items_max: int, bytes_max: int) -> None:
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._items)

    def _full(self, size: int) -> bool:
        if not self._items:
            return False
        return len(self._items) >= self._items_max or self._bytes + size > self._bytes_max

    async def put(self, item: T, size: int = 0) -> None:
        """Add `item` of `size` bytes; waits for room. After the end it is dropped: else the error would never be reached."""
        while self._full(size) and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if self._ended:
            return
        self._items.append((item, size))
        self._bytes += size
        self._changed.set()

    def add(self, item: T) -> None:
        """Add `item` without waiting for room. For the few items that are added by whoever would have to make room."""
        if not self._ended:
            self._items.append((item, 0))
            self._changed.set()

    def put_back(self, item: T, size: int = 0) -> None:
        """Put back the `item` that was just taken: it is the next one again."""
        self._items.appendleft((item, size))
        self._bytes += size
        self._changed.set()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come: what waits can still be taken, then `get` raises `error` or StopAsyncIteration."""
        if not self._ended:
            self._ended = True
            self._error = error
        self._changed.set()

    async def get(self) -> T:
        """The next item.

        Raises:
            StopAsyncIteration: the mailbox has ended without an error.
        """
        while not self._items:
            if self._ended:
                raise self._error or StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        item, size = self._items.popleft()
        self._bytes -= size
        self._changed.set()
        return item
