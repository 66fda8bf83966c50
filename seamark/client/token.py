"""Where the user's token comes from, and when to ask for the next one."""

from __future__ import annotations

import base64
import binascii
import inspect
import time
from collections.abc import Awaitable, Callable

import msgspec

from seamark.client.errors import NotAuthenticated

TokenCallable = Callable[[], str | Awaitable[str]]


def expiry_of(token: str) -> float | None:
    """The `exp` claim of a JWT in Unix seconds, read without verifying; None when it says none or is no JWT."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        payload = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = msgspec.json.decode(payload, type=dict[str, object])
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return None
    expires = claims.get("exp")
    return float(expires) if isinstance(expires, int | float) else None


def refresh_delay(lifetime_seconds: float) -> float:
    """How long after a token with `lifetime_seconds` left was sent the next one is due.

    A minute before the end, or after four fifths of a life shorter than five minutes: early enough for a slow
    identity provider and a second try.
    """
    return max(1.0, lifetime_seconds - min(60.0, lifetime_seconds / 5))


class TokenSource:
    """Gives tokens and knows whether another one can be had.

    Args:
        token: the token itself, or a callable (plain or async) that gives a valid one each time it is called.
    """

    def __init__(self, token: str | TokenCallable, *, clock: Callable[[], float] = time.time) -> None:
        self._source = token
        self._clock = clock
        self._refused: str | None = None
        self._refusals = 0
        self.current = token if isinstance(token, str) else ""

    @property
    def renewable(self) -> bool:
        """The source is a callable."""
        return not isinstance(self._source, str)

    async def next(self) -> str:
        """A token to present now.

        Raises:
            NotAuthenticated: the only token to be had was refused already, or three in a row were.
        """
        if isinstance(self._source, str):
            token = self._source
        else:
            given = self._source()
            token = await given if inspect.isawaitable(given) else given
        if self._refusals >= 3 or (self._refused is not None and token == self._refused):
            raise NotAuthenticated
        self.current = token
        return token

    def refused(self) -> None:
        """The gateway closed with 4401 (or answered 401) to the current token."""
        self._refused = self.current
        self._refusals += 1

    def accepted(self) -> None:
        """The gateway took the current token."""
        self._refused = None
        self._refusals = 0

    def refresh_in_seconds(self) -> float | None:
        """When to present another token in this session; None if there is no other or it never expires."""
        expires = expiry_of(self.current) if self.renewable else None
        return None if expires is None else refresh_delay(expires - self._clock())
