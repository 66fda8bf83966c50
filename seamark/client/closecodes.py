"""What a close code of `seamark.v1` asks of a client: reconnect, get another token first, or stop."""

from __future__ import annotations

from enum import Enum
from typing import Final

from seamark.client.errors import ClientError, NotAuthenticated, TooManySessions
from seamark.protocol.close_codes import TABLE


class Verdict(Enum):
    """What to do after a connection has ended."""

    RECONNECT = "reconnect"
    RENEW = "renew"
    """Ask for another token; reconnect if it differs from the refused one, else stop."""
    STOP = "stop"


_STOP: Final = frozenset({1009, *(row.code for row in TABLE if not row.reconnect)})
"""A WebSocket layer says 1009 of a message that is too large for it."""

_MEANINGS: Final = {row.code: row.meaning for row in TABLE}

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
    kind = {4401: NotAuthenticated, 4409: TooManySessions}.get(code, ClientError)
    said = f"{kind.__doc__} (close code {code}: {_MEANINGS.get(code, 'not known')}"
    return kind(f"{said}; {reason})" if reason else f"{said})")
