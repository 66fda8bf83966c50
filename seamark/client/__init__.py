"""The Python SDK: publish events, follow a user's log."""

from seamark.backoff import Backoff
from seamark.client.connection import Connection, connect
from seamark.client.cursorstore import Bookmark, CursorStore, FileCursor, MemoryCursor
from seamark.client.errors import (
    ClientError,
    ConnectionClosed,
    Forbidden,
    NotAuthenticated,
    ProtocolError,
    PublishFailed,
    PublishRefused,
    TooManySessions,
    UserChanged,
)
from seamark.client.items import Live, Now, Problem, Record, Reset, State, Unread
from seamark.client.publisher import Published, Publisher
from seamark.client.session import Timing

__all__ = [
    "Backoff",
    "Bookmark",
    "ClientError",
    "Connection",
    "ConnectionClosed",
    "CursorStore",
    "FileCursor",
    "Forbidden",
    "Live",
    "MemoryCursor",
    "NotAuthenticated",
    "Now",
    "Problem",
    "ProtocolError",
    "PublishFailed",
    "PublishRefused",
    "Published",
    "Publisher",
    "Record",
    "Reset",
    "State",
    "Timing",
    "TooManySessions",
    "Unread",
    "UserChanged",
    "connect",
]
