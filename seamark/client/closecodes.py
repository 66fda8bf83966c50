"""What a close code of `seamark.v1` asks of a client: reconnect, get another token first, or stop."""

from __future__ import annotations

from enum import Enum
from typing import Final

from seamark.client.errors import ClientError, Forbidden, NotAuthenticated, ProtocolError, TooManySessions


class Verdict(Enum):
    """What to do after a connection has ended."""

    RECONNECT = "reconnect"
    RENEW = "renew"
    """Ask for another token; reconnect if it differs from the refused one, else stop."""
    STOP = "stop"


_STOP: Final[dict[int, type[ClientError]]] = {
    1009: ProtocolError,
    4400: ProtocolError,
    4403: Forbidden,
    4409: TooManySessions,
    4413: ProtocolError,
}

_HTTP: Final[dict[int, int]] = {400: 4400, 401: 4401, 403: 4403, 404: 4400, 413: 4413, 426: 4400, 429: 4429}

TOO_MANY: Final = 4429
"""Too many connections or frames."""

TOO_MANY_SECONDS: Final = 60.0
"""How long to stay away then, unless the gateway names a time: its bucket of frames is a minute's."""


def verdict(code: int) -> Verdict:
    """What close code `code` asks for. Codes not listed are faults of the way between: reconnect."""
    if code == 4401:
        return Verdict.RENEW
    return Verdict.STOP if code in _STOP else Verdict.RECONNECT


def code_of_status(status: int) -> int:
    """The close code that says the same as HTTP status `status` of a refused handshake; 1006 where none does."""
    return _HTTP.get(status, 1006)


def error_of(code: int, reason: str) -> ClientError:
    """The error an app gets for a code that says stop."""
    kind = NotAuthenticated if code == 4401 else _STOP.get(code, ClientError)
    said = f": {reason}" if reason else ""
    return kind(f"{(kind.__doc__ or '').strip()} (close code {code}{said})")
