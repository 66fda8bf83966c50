"""Errors of the SDK: one class for each that an app would treat differently. Retrying cannot mend what reaches the app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from seamark.protocol.close_codes import TABLE, TOO_MANY_SESSIONS, UNAUTHENTICATED
from seamark.protocol.errors import SeamarkError


class ClientError(SeamarkError):
    """The Seamark client cannot go on."""


class NotAuthenticated(ClientError):
    """The gateway does not accept the token, and no other one is to be had."""


class UserChanged(ClientError):
    """The token is of another user than this connection follows. Close it, and make one for the other user."""


class TooManySessions(ClientError):
    """Another session of this user took the place of this one. Reconnecting would push out the next, so it stops."""


class ConnectionClosed(ClientError):
    """The connection was closed by the app."""


class PublishRefused(ClientError):
    """The event is refused for good, and not stored.

    Attributes:
        status: of HTTP over the gateway, JetStream's `code` over NATS.
        problem: the problem document, or JetStream's error.
    """

    def __init__(self, status: int, problem: Mapping[str, object]) -> None:
        said = problem.get("detail") or problem.get("description") or problem.get("title") or "refused"
        super().__init__(f"event refused with {status}: {said}")
        self.status = status
        self.problem = problem


class PublishFailed(ClientError):
    """Not published within its budget; whether it was stored is unknown. Publishing the same id again is safe."""


_OF_CODE: Final = {UNAUTHENTICATED.code: NotAuthenticated, TOO_MANY_SESSIONS.code: TooManySessions}
_MEANINGS: Final = {row.code: row.meaning for row in TABLE}


def error_of(code: int, reason: str) -> ClientError:
    """The error an app gets for a close code that says stop."""
    kind = _OF_CODE.get(code, ClientError)
    said = f"{kind.__doc__} (close code {code}: {_MEANINGS.get(code, 'not known')}"
    return kind(f"{said}; {reason})" if reason else f"{said})")


class Again(Exception):
    """An attempt failed for a reason that may pass; `wait_seconds` is what the gateway asked for. It never reaches the app."""

    def __init__(self, why: Exception | str, wait_seconds: float = 0.0) -> None:
        super().__init__(why if isinstance(why, str) else f"{type(why).__name__} {why}".rstrip())
        self.wait_seconds = wait_seconds
