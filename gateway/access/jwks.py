"""Keys that tokens are signed with: one shared secret in development, a JSON Web Key Set with rotation otherwise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import aiohttp
import jwt
import msgspec
import structlog

from gateway.limits import (
    JWKS_BYTES,
    JWKS_COOLDOWN_SECONDS,
    JWKS_FETCH_SECONDS,
    JWKS_FRESH_SECONDS,
    JWKS_LACKING,
    JWKS_PUBLISHED_SECONDS,
    JWKS_STALE_SECONDS,
)

_log = structlog.get_logger("seamark.jwks")

SECRET_BYTES_MIN: Final = 32
"""HS256 needs a key of at least the hash's length (RFC 7518, 3.2)."""

_ALGORITHMS: Final = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
}
"""What each type of key may sign with. Symmetric keys (`oct`) have no place in a published set."""


class Key(msgspec.Struct, frozen=True):
    """One verification key and the algorithms it is fixed to, whatever a token's header claims."""

    key: Any
    algorithms: tuple[str, ...]


class KeysUnavailable(Exception):
    """The signing keys cannot be had at the moment."""


class Keys(Protocol):
    """Where a verifier gets its keys."""

    generation: int
    """Rises whenever the keys change: tokens verified under an older generation are verified again."""

    async def find(self, kid: str | None) -> Key | None:
        """The key named `kid` (None: the only key there is), or None when there is no such key.

        Raises:
            KeysUnavailable: nothing is known at the moment.
        """

    async def close(self) -> None:
        """Let go of connections."""


class SharedSecret:
    """HS256 with one secret: for development.

    Raises:
        ValueError: the secret is shorter than 32 bytes.
    """

    generation = 0

    def __init__(self, secret: str) -> None:
        data = secret.encode()
        if len(data) < SECRET_BYTES_MIN:
            raise ValueError(f"the JWT secret must have at least {SECRET_BYTES_MIN} bytes, this one has {len(data)}")
        self._key = Key(data, ("HS256",))

    async def find(self, kid: str | None) -> Key | None:
        """The secret, whatever `kid` says."""
        return self._key

    async def close(self) -> None:
        """Nothing to let go of."""


class KeySet:
    """A JWKS fetched from one configured address.

    A known key is answered at once. After 5 minutes the set is renewed in the background, so a slow issuer stalls nobody;
    while it cannot be renewed, the old set is used for up to an hour. An unknown `kid` waits for a fetch. Fetches are at
    least 5 s apart, so a flood of unknown ids costs no more; in between, an unknown `kid` is told to try again rather than
    refused. Keys that are listed side by side (rotation) all work.

    Args:
        url: address of the set; only ever taken from settings, never from a token.
        now: monotonic clock in seconds.
    """

    def __init__(self, url: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._now = now
        self._keys: dict[str, Key] = {}
        self._lacking: set[str | None] = set()
        """Ids that were asked for and are missing from the set as it was fetched last."""
        self._fetched_at = self._began_at = self._tried_at = -1e9
        self._fetching: asyncio.Task[None] | None = None
        self._http: aiohttp.ClientSession | None = None
        self.generation = 0

    async def find(self, kid: str | None) -> Key | None:
        """The key named `kid`.

        Raises:
            KeysUnavailable: no set could be fetched, the set is older than an hour, or it is too early to ask the issuer
                again for this key.
        """
        asked_at = self._now()
        if self._usable and (key := self._choose(kid)) is not None:
            if asked_at - self._fetched_at > JWKS_FRESH_SECONDS:
                self._renew()
            return key
        if (fetching := self._renew()) is not None:
            await asyncio.shield(fetching)
        if not self._usable:
            raise KeysUnavailable("the key set could not be fetched")
        if (key := self._choose(kid)) is not None:
            return key
        if self._began_at >= asked_at - JWKS_PUBLISHED_SECONDS and len(self._lacking) < JWKS_LACKING:
            self._lacking.add(kid)
        if kid in self._lacking:
            return None
        raise KeysUnavailable("the key set was fetched a moment ago, and will be again")

    @property
    def _usable(self) -> bool:
        return self._now() - self._fetched_at <= JWKS_STALE_SECONDS

    def _choose(self, kid: str | None) -> Key | None:
        if kid is not None:
            return self._keys.get(kid)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _renew(self) -> asyncio.Task[None] | None:
        """The fetch under way, or a new one if it is time for one; None otherwise."""
        if self._fetching is None and self._now() - self._tried_at >= JWKS_COOLDOWN_SECONDS:
            self._fetching = asyncio.create_task(self._fetch(), name="jwks-fetch")
        return self._fetching

    async def _fetch(self) -> None:
        began_at = self._now()
        try:
            keys = _parse(await self._get())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            _log.warning("jwks_fetch_failed", error=f"{type(error).__name__}: {error}")
        else:
            if keys != self._keys:  # not their names: an issuer may replace a key under the same `kid`
                self.generation += 1
            self._keys = keys
            self._lacking.clear()
            self._fetched_at, self._began_at = self._now(), began_at
        finally:
            self._tried_at = self._now()
            self._fetching = None

    async def _get(self) -> bytes:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=JWKS_FETCH_SECONDS))
        async with self._http.get(self._url, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"the key set answered {response.status}")
            body = await response.content.read(JWKS_BYTES + 1)
            while len(body) <= JWKS_BYTES and (more := await response.content.read(JWKS_BYTES)):
                body += more
        if len(body) > JWKS_BYTES:
            raise ValueError(f"the key set is larger than {JWKS_BYTES} bytes")
        return body

    async def close(self) -> None:
        """Close the connection to the issuer."""
        if self._fetching is not None:
            self._fetching.cancel()
        if self._http is not None:
            await self._http.close()


def _parse(body: bytes) -> dict[str, Key]:
    """The usable keys of a set by `kid`; keys of unknown kinds and for other uses are left out.

    Raises:
        ValueError: not a key set, or none of its keys is usable.
    """
    try:
        listed = msgspec.json.decode(body)["keys"]
        entries = [entry for entry in listed if isinstance(entry, dict)]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ValueError("not a JSON Web Key Set") from error
    keys: dict[str, Key] = {}
    for entry in entries:
        allowed = _ALGORITHMS.get(str(entry.get("kty")), ())
        declared = entry.get("alg")
        if entry.get("use", "sig") != "sig" or not allowed or (declared is not None and declared not in allowed):
            continue
        try:
            key = jwt.PyJWK(entry, algorithm=declared)
        except (jwt.PyJWTError, ValueError, TypeError) as error:  # one broken key must not cost the others
            _log.warning("jwks_key_unusable", error=f"{type(error).__name__}: {error}")
            continue
        keys[str(entry.get("kid", ""))] = Key(key.key, (declared,) if declared else _default(entry, allowed))
    if not keys:
        raise ValueError("no usable key in the set")
    return keys


def _default(entry: dict[str, Any], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The algorithm of a key that names none: RS256 and EdDSA by custom, for EC the one its curve fixes."""
    if entry.get("kty") == "EC":
        return ({"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}.get(str(entry.get("crv")), "ES256"),)
    return (allowed[0],)
