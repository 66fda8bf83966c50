"""What one client is told of its user's unread count: the count in its first frame, then each change, never an older one."""

from __future__ import annotations

from gateway.session.outlet import Outlet
from gateway.stores.counts import as_of
from seamark.protocol.frames import Unread


class ToldCount:
    """The count on its way to one client. Each frame holds the whole count, so only the newest is kept while there is no room.

    Attributes:
        begun: the client has had its first frame; before it no change is told.
    """

    __slots__ = ("_first", "_outlet", "_waiting", "begun")

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._first: Unread | None = None
        self._waiting: bytes | None = None
        self.begun = False

    def read(self, count: Unread | None) -> None:
        """The count as it was when the log was joined, for the first frame."""
        self._first = count
        self._forget_older_than(count)

    def take(self) -> Unread | None:
        """The count for the first frame. Only the first call gives it."""
        count, self._first = self._first, None
        return count

    def replace(self, count: Unread | None) -> None:
        """A snapshot brings `count`. A frame that waits is older than it, or in mid-session may be of another log."""
        if self.begun:
            self._waiting = None
        self._forget_older_than(count)

    def tell(self, frame: bytes) -> None:
        """Send a change as soon as there is room, but never before the first frame."""
        if self.begun and self._outlet.room():
            self._waiting = None
            self._outlet.send(frame)
        else:
            self._waiting = frame

    def tell_waiting(self) -> None:
        """Send the change that waits: there may be room now, or the first frame is out."""
        frame, self._waiting = self._waiting, None
        if frame is not None:
            self.tell(frame)

    def _forget_older_than(self, count: Unread | None) -> None:
        if self._waiting is not None and count is not None and as_of(self._waiting) <= count.as_of:
            self._waiting = None
