"""Keeps the device's place in the log: what is done is stored soon and in order, and nothing else is stored.

A record counts as done when the app comes back for the next one (or calls `ack()`, where it chose to). Only what is
done is stored, so an app that dies while it handles a record gets that record again: at least once. What the gateway
says beside records (`live`, `pong`, `skip`) moves the stored cursor too, but never past a record that is not done.
"""

from __future__ import annotations

import asyncio

from seamark.client.cursorstore import Bookmark, CursorStore
from seamark.client.token import Owner


class Keeper:
    """How far the app is, and the store that remembers it. Cumulative: a record done means all before it are done.

    Args:
        store: where the cursor is kept over sessions and restarts.
    """

    def __init__(self, store: CursorStore) -> None:
        self.store = store
        self.cursor: str | None = None
        """The cursor that is (or is about to be) stored: everything up to it is done."""
        self.owner = Owner(None, None)
        """Whose log the cursors are of."""
        self._saved: str | None = None
        self._passed: str | None = None
        self._taken = self._done = 0
        self._due = asyncio.Event()
        self._closed = False

    def taken(self, cursor: str) -> int:
        """The app took the record or snapshot at `cursor`. The ticket says later which one is done."""
        self._taken += 1
        self._passed = cursor
        return self._taken

    def passed(self, cursor: str) -> None:
        """The log moved to `cursor` without anything for the app."""
        self._passed = cursor
        if self._done == self._taken:
            self.cursor = cursor
            self._due.set()

    def done(self, ticket: int, cursor: str) -> bool:
        """What was taken with `ticket` at `cursor`, and all before it, is done. False if that was known already."""
        if ticket <= self._done:
            return False
        self._done = ticket
        self.cursor = self._passed if ticket == self._taken else cursor
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
        cursor = self.cursor
        if cursor is not None and cursor != self._saved:
            await self.store.save(Bookmark(cursor, *self.owner))
            self._saved = cursor
