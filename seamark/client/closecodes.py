"""What a close code of `seamark.v1` asks of a client: reconnect, get another token first, or stop."""

from __future__ import annotations

from enum import Enum
from typing import Final

from seamark.client.errors import ClientError, Forbidden, NotAuthenticated, ProtocolError, TooManySessions
from seamark.protocol.close_codes import FORBIDDEN, STOP, TOO_MANY_SESSIONS, UNAUTHENTICATED


class Verdict(Enum):
    """What to do after a connection has ended."""

    RECONNECT = "reconnect"
    RENEW = "renew"
    """Ask for another token; reconnect if it differs from the refused one, else stop."""
    STOP = "stop"


_ERRORS: Final[dict[int, type[ClientError]]] = {
    UNAUTHENTICATED.code: NotAuthenticated,
    FORBIDDEN.code: Forbidden,
    TOO_MANY_SESSIONS.code: TooManySessions,
}

TOO_MANY_SECONDS: Final = 60.0
"""How long to stay away after 4429, unless the gateway names a time: its bucket of frames is a minute's."""


def verdict(code: int) -> Verdict:
    """What close code `code` asks for. Codes not listed are faults of the way between: reconnect."""
    if code == UNAUTHENTICATED.code:
        return Verdict.RENEW
    return Verdict.STOP if code in STOP else Verdict.RECONNECT


def error_of(code: int, reason: str) -> ClientError:
    """The error an app gets for a code that says stop."""
    kind = _ERRORS.get(code, ProtocolError)
    said = f": {reason}" if reason else ""
    return kind(f"{(kind.__doc__ or '').strip()} (close code {code}{said})")
