"""Errors of the SDK. Each says whose fault it is; an error that reaches the app is one that retrying cannot mend."""

from __future__ import annotations

from seamark.protocol.errors import SeamarkError


class ClientError(SeamarkError):
    """The Seamark client cannot go on."""


class NotAuthenticated(ClientError):
    """The gateway does not accept the token, and no other one is to be had."""


class UserChanged(ClientError):
    """The token is of another user than this connection follows. Close it, and make one for the other user."""


class Forbidden(ClientError):
    """The token is valid but may not do this, or the page's Origin is not on the gateway's list."""


class ProtocolError(ClientError):
    """Client and gateway do not understand each other: one of them is wrong or speaks another version."""


class TooManySessions(ClientError):
    """Another session of this user took the place of this one. Reconnecting would push out the next, so it stops."""


class ConnectionClosed(ClientError):
    """The connection was closed by the app."""


class PublishRefused(ClientError):
    """The gateway refused the event for good. `status` is the HTTP status, `problem` the problem document."""

    def __init__(self, status: int, problem: dict[str, object]) -> None:
        title = problem.get("detail") or problem.get("title") or "refused"
        super().__init__(f"event refused with {status}: {title}")
        self.status = status
        self.problem = problem


class PublishFailed(ClientError):
    """Not published within its budget; whether it was stored is unknown. Publishing the same id again is safe."""
