"""Keeps the device's place in the log: what is done is stored soon and in order, and nothing else is stored."""

from __future__ import annotations

import asyncio

from seamark.client.cursorstore import Bookmark, CursorStore
from seamark.client.progress import Progress
from seamark.client.token import Owner


class Keeper:
    """How far the app is, and the store that remembers it.

    Args:
        store: where the cursor is kept over sessions and restarts.
    """

    def __init__(self, store: CursorStore) -> None:
        self._store = store
        self._progress = Progress()
        self._due = asyncio.Event()
        self._saved: str | None = None
        self._closed = False
        self.owner = Owner(None, None)
        """Whose log the cursors are of."""

    @property
    def cursor(self) -> str | None:
        """The cursor that is (or is about to be) stored: everything up to it is done."""
        return self._progress.cursor

    async def load(self) -> Bookmark | None:
        """What was stored before. Raises whatever the store raises."""
        return await self._store.load()

    def taken(self, cursor: str) -> int:
        """The app took the record or snapshot at `cursor`. The ticket says later which one is done."""
        return self._progress.taken(cursor)

    def passed(self, cursor: str) -> None:
        """The log moved to `cursor` without anything for the app."""
        self._progress.passed(cursor)
        self._due.set()

    def done(self, ticket: int, cursor: str) -> bool:
        """What was taken with `ticket` at `cursor`, and all before it, is done. False if that was known already."""
        if not self._progress.done(ticket, cursor):
            return False
        self._due.set()
        return True

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
        cursor = self._progress.cursor
        if cursor is not None and cursor != self._saved:
            await self._store.save(Bookmark(cursor, *self.owner))
            self._saved = cursor
