"""Close codes of `seamark.v1`: why a session ended, and whether the client should come back."""

from typing import Final, NamedTuple


class CloseCode(NamedTuple):
    """One row of the table in `docs/protocol.md`."""

    code: int
    name: str
    reconnect: bool
    """True: reconnect with the cursor held, after a jittered delay. False: stop until something is changed."""
    meaning: str
    status: int = 503
    """The HTTP status that says the same where there is no session yet."""


BAD_FRAME: Final = CloseCode(
    4400, "bad_frame", False, "a frame was not valid, or acknowledged what was never sent", 400
)
UNAUTHENTICATED: Final = CloseCode(4401, "unauthenticated", False, "no valid token, or it expired: get a new one", 401)
FORBIDDEN: Final = CloseCode(4403, "forbidden", False, "the token does not allow this", 403)
NO_HELLO: Final = CloseCode(4407, "no_hello", True, "no `hello` came in time")
NO_PONG: Final = CloseCode(4408, "no_pong", True, "a ping was not answered in time")
TOO_MANY_SESSIONS: Final = CloseCode(
    4409, "too_many_sessions", False, "a newer session of the user took the place", 409
)
TOO_LARGE: Final = CloseCode(4413, "too_large", False, "a frame was larger than 64 KiB", 413)
TOO_MANY_FRAMES: Final = CloseCode(4429, "too_many_frames", True, "too many frames: reconnect after a minute", 429)
RESTARTING: Final = CloseCode(
    1012, "restarting", True, "the gateway restarts: reconnect after `retry_after_ms` of `bye`"
)
OVERLOADED: Final = CloseCode(1013, "overloaded", True, "the gateway has too much to do for this session now")
FAILED: Final = CloseCode(1011, "failed", True, "the gateway could not go on with this session")
NORMAL: Final = CloseCode(1000, "normal", True, "the end of a session in good order; a client that closed stays away")

TABLE: Final[tuple[CloseCode, ...]] = (
    BAD_FRAME,
    UNAUTHENTICATED,
    FORBIDDEN,
    NO_HELLO,
    NO_PONG,
    TOO_MANY_SESSIONS,
    TOO_LARGE,
    TOO_MANY_FRAMES,
    RESTARTING,
    OVERLOADED,
    FAILED,
    NORMAL,
)
"""Every code a server of `seamark.v1` sends, in the order of the documentation."""

STOP: Final = frozenset({1009, *(row.code for row in TABLE if not row.reconnect)} - {UNAUTHENTICATED.code})
"""Codes that end a client for good. A WebSocket layer says 1009 of a message that is too large for it. 4401 is a question of the
token: a client asks for another one."""

CODE_OF_STATUS: Final = {404: BAD_FRAME.code, 426: BAD_FRAME.code} | {
    row.status: row.code for row in TABLE if row.status < 500
}
"""What HTTP answers to a handshake mean. Any other is a fault of the way between."""
