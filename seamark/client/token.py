"""Where the user's token comes from, and when to ask for the next one."""

from __future__ import annotations

import base64
import binascii
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import msgspec

from seamark.client.errors import NotAuthenticated, UserChanged

TokenCallable = Callable[[], str | Awaitable[str]]


EXPIRY_SECONDS: Final = 10.0
"""No session begins with a token that has less time left."""

REFUSALS_MAX: Final = 3
"""Refusals in a row that are final. The first one is not: a slow gateway may refuse a good token."""


class Owner(NamedTuple):
    """Whose log a token opens. Positions and marks of one owner mean nothing in the log of another."""

    tenant: str | None
    user: str | None


class Claims(msgspec.Struct):
    """What a token says of itself, as far as a client needs it. None: it does not say."""

    tenant: str | None = None
    sub: str | None = None
    exp: float | None = None
    iat: float | None = None


_claims_in = msgspec.json.Decoder(Claims).decode


def claims_of(token: str) -> Claims:
    """The claims of a JWT, read without verifying; none when `token` is no JWT, or one with a claim that cannot be."""
    _, _, rest = token.partition(".")
    payload, _, signature = rest.partition(".")
    try:
        return _claims_in(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))) if signature else Claims()
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return Claims()


def refresh_delay(lifetime_seconds: float) -> float:
    """How long after a token with `lifetime_seconds` left was sent the next one is due.

    A minute before the end, or after four fifths of a life shorter than five minutes: early enough for a slow
    identity provider and a second try.
    """
    return max(1.0, lifetime_seconds - min(60.0, lifetime_seconds / 5))


class TokenSource:
    """Gives tokens and knows whether another one can be had.

    A token serves until it expires or is refused, so a network that flaps does not cost the issuer a request each time.

    Args:
        token: the token itself, or a callable (plain or async) that gives a valid one each time it is called.
    """

    def __init__(self, token: str | TokenCallable, *, clock: Callable[[], float] = time.time) -> None:
        self._source = token
        self._clock = clock
        self._refused: str | None = None
        self._refusals = 0
        self.current = token if isinstance(token, str) else ""
        self.owner: Owner | None = None
        """Whose tokens these are; None before the first."""

    @property
    def exhausted(self) -> bool:
        """There is no token left that the gateway has not refused."""
        if self._refusals >= REFUSALS_MAX:
            return True
        return self._refusals > 0 and isinstance(self._source, str) and self._expires_within(0.0)

    async def next(self) -> str:
        """A token to begin a session with: the current one while it serves.

        Raises:
            NotAuthenticated: there is none left. UserChanged: it is another user's. TypeError: it is no text.
        """
        if self.exhausted:
            raise NotAuthenticated
        wanted = not self.current or self.current == self._refused or self._expires_within(EXPIRY_SECONDS)
        if not wanted or isinstance(self._source, str):
            return self._take(self.current)
        return await self.fresh()

    async def fresh(self) -> str:
        """Another token, if the source can give one.

        Raises:
            UserChanged: it is another user's. TypeError: it is no text. Whatever the source raises.
        """
        if isinstance(self._source, str):
            return self._take(self._source)
        given = self._source()
        return self._take(await given if inspect.isawaitable(given) else given)

    def _take(self, token: object) -> str:
        if not isinstance(token, str) or not token:
            raise TypeError(f"`token` gave {type(token).__name__}; it must give the user's token as text")
        claims = claims_of(token)
        owner = Owner(claims.tenant, claims.sub)
        if self.owner is not None and owner != self.owner:
            raise UserChanged
        self.current, self.owner = token, owner
        return token

    def _expires_within(self, seconds: float) -> bool:
        expires = claims_of(self.current).exp
        return expires is not None and expires - self._clock() < seconds

    def refused(self) -> None:
        """The gateway closed with 4401 after the current token was presented."""
        self._refused = self.current
        self._refusals += 1

    def accepted(self) -> None:
        """The gateway took the current token."""
        self._refused = None
        self._refusals = 0

    def refresh_in_seconds(self) -> float | None:
        """When to present another token in this session; None if there is no other or it never expires."""
        claims = claims_of(self.current)
        expires, issued = claims.exp, claims.iat
        if isinstance(self._source, str) or expires is None:
            return None
        left = expires - self._clock()
        if left > 0:
            return refresh_delay(left)
        # The gateway accepted it, so our clock is ahead: go by the token's own life instead of asking every second.
        return refresh_delay(expires - issued) if issued is not None and expires > issued else None
