"""How far the app is: which cursor may be stored and acknowledged. Pure.

A record counts as done when the app comes back for the next one (or calls `ack()`, where it chose to). Only what is
done is stored, so an app that dies while it handles a record gets that record again: at least once. What the gateway
says beside records (`live`, `pong`, `skip`) moves the stored cursor too, but never past a record that is not done.
"""

from __future__ import annotations


class Progress:
    """Cumulative: a record done means all before it are done."""

    def __init__(self) -> None:
        self.cursor: str | None = None
        """The highest cursor that may be stored: everything up to it is done."""
        self._ticket = 0
        self._done = 0
        self._passed: str | None = None

    def taken(self, cursor: str) -> int:
        """The app took the record or snapshot at `cursor`. The ticket says later which one is done."""
        self._ticket += 1
        self._passed = cursor
        return self._ticket

    def passed(self, cursor: str) -> None:
        """The log moved to `cursor` without anything for the app."""
        self._passed = cursor
        if self._done == self._ticket:
            self.cursor = cursor

    def done(self, ticket: int, cursor: str) -> bool:
        """What was taken with `ticket` at `cursor`, and all before it, is done. False if that was known already."""
        if ticket <= self._done:
            return False
        self._done = ticket
        self.cursor = self._passed if ticket == self._ticket else cursor
        return True
