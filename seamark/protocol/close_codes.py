"""Close codes of `seamark.v1`: why a session ended, and whether the client should come back."""

from typing import Final, NamedTuple


class CloseCode(NamedTuple):
    """One row of the table in `docs/protocol.md`."""

    code: int
    name: str
    reconnect: bool
    """True: reconnect with the cursor held, after a jittered delay. False: stop until something is changed."""
    meaning: str


BAD_FRAME: Final = CloseCode(4400, "bad_frame", False, "a frame was not valid, or acknowledged what was never sent")
UNAUTHENTICATED: Final = CloseCode(4401, "unauthenticated", False, "no valid token, or it expired: get a new one")
FORBIDDEN: Final = CloseCode(4403, "forbidden", False, "the token does not allow this")
NO_HELLO: Final = CloseCode(4407, "no_hello", True, "no `hello` came in time")
NO_PONG: Final = CloseCode(4408, "no_pong", True, "a ping was not answered in time")
TOO_MANY_SESSIONS: Final = CloseCode(4409, "too_many_sessions", False, "a newer session of the user took the place")
TOO_LARGE: Final = CloseCode(4413, "too_large", False, "a frame was larger than 64 KiB")
TOO_MANY_FRAMES: Final = CloseCode(4429, "too_many_frames", True, "too many frames: reconnect after a minute")
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
