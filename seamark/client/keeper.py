"""Keeps the device's place in the log: what is done is stored soon and in order, and nothing else is stored."""

from __future__ import annotations

import asyncio

from seamark.client.cursorstore import Bookmark, CursorStore
from seamark.client.progress import Progress
from seamark.client.token import Owner


class Keeper(Progress):
    """How far the app is, and the store that remembers it.

    Args:
        store: where the cursor is kept over sessions and restarts.
    """

    def __init__(self, store: CursorStore) -> None:
        super().__init__()
        self.store = store
        self._due = asyncio.Event()
        self._saved: str | None = None
        self._closed = False
        self.owner = Owner(None, None)
        """Whose log the cursors are of."""

    def passed(self, cursor: str) -> None:
        """The log moved to `cursor` without anything for the app."""
        super().passed(cursor)
        self._due.set()

    def done(self, ticket: int, cursor: str) -> bool:
        """What was taken with `ticket` at `cursor`, and all before it, is done. False if that was known already."""
        moved = super().done(ticket, cursor)
        if moved:
            self._due.set()
        return moved

    async def keep_stored(self) -> None:
        """Store the cursor whenever it has moved, until `close`. Raises whatever the store raises."""
        while not self._closed:
            await self._due.wait()
            self._due.clear()
            await self.save()

    def close(self) -> None:
        """Let `keep_stored` end by itself: a save cut off goes on in its thread, and could overtake the last one."""
        self._closed = True
        self._due.set()

    async def save(self) -> None:
        """Store the cursor now, if it has moved. Raises whatever the store raises."""
        if self.cursor is not None and self.cursor != self._saved:
            cursor = self.cursor
            await self.store.save(Bookmark(cursor, *self.owner))
            self._saved = cursor
