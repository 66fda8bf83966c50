"""What `seamark` offers: publish events, follow a user's log. Import it from there."""

from seamark.backoff import Backoff
from seamark.client.connection import Connection, connect
from seamark.client.cursorstore import Bookmark, CursorStore, FileCursor, MemoryCursor
from seamark.client.errors import (
    ClientError,
    ConnectionClosed,
    NotAuthenticated,
    PublishFailed,
    PublishRefused,
    TooManySessions,
    UserChanged,
)
from seamark.client.items import Item, Live, Now, Problem, Record, Reset, State
from seamark.client.publisher import Published, Publisher
from seamark.client.session import Timing
from seamark.protocol.errors import InvalidCursor, InvalidEvent, SeamarkError
from seamark.protocol.frames import Unread

__all__ = [
    "Backoff",
    "Bookmark",
    "ClientError",
    "Connection",
    "ConnectionClosed",
    "CursorStore",
    "FileCursor",
    "InvalidCursor",
    "InvalidEvent",
    "Item",
    "Live",
    "MemoryCursor",
    "NotAuthenticated",
    "Now",
    "Problem",
    "PublishFailed",
    "PublishRefused",
    "Published",
    "Publisher",
    "Record",
    "Reset",
    "SeamarkError",
    "State",
    "Timing",
    "TooManySessions",
    "Unread",
    "UserChanged",
    "connect",
]
