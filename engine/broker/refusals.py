"""What the server's error codes mean to us: each stands here once."""

from __future__ import annotations

from typing import Final

from engine.errors import ApiError

BATCH_INCOMPLETE: Final = 10176
"""One message of a batch, not the first, is refused, and the server does not say why. One that cannot put a batch aside, as its
disk is full, says so of any."""

STREAM_MISSING: Final = 10059
TOO_LARGE: Final = 10054
"""The message is above `max_msg_size` or `max_payload`, headers included: sent again, it is as large as before."""

WRONG_LAST_SEQUENCE: Final = 10071

_SERVER_TROUBLE: Final = 500
"""From this code on the broker speaks of its own state, below of what was asked."""

_OVERTAKEN: Final = frozenset({WRONG_LAST_SEQUENCE, 10164})
"""The last message is another one; or the server is about to store another one, and says so before it has."""

_FULL: Final = frozenset({10077, 10023, 10028, 10047})
"""The stream is at its `max_bytes`, or the account or server has no room left: no election ends that."""


def is_missing(error: BaseException) -> bool:
    """Whether the server says that the stream does not exist."""
    return isinstance(error, ApiError) and error.err_code == STREAM_MISSING


def is_final(error: BaseException) -> bool:
    """Whether the server takes these very messages never: nothing else, as room or what others write, could change that."""
    passes = _OVERTAKEN | _FULL | {STREAM_MISSING, BATCH_INCOMPLETE}
    return isinstance(error, ApiError) and error.code < _SERVER_TROUBLE and error.err_code not in passes


def is_incomplete(error: BaseException) -> bool:
    """Whether the server says no more than that it has not taken all of a batch."""
    return isinstance(error, ApiError) and error.err_code == BATCH_INCOMPLETE


def is_full(error: BaseException) -> bool:
    """Whether the server says that there is no room."""
    return isinstance(error, ApiError) and error.err_code in _FULL


def is_overtaken(error: BaseException) -> bool:
    """Whether somebody else has written, or is writing, behind the message that a write had to follow: look again."""
    return isinstance(error, ApiError) and error.err_code in _OVERTAKEN
