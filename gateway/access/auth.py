"""Who a token speaks for. Verified once, remembered by digest, its expiry checked at every use."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jwt

from gateway.access.jwks import Key, Keys, KeysUnavailable
from gateway.access.principals import User
from gateway.access.sign_outs import SignOuts
from gateway.limits import TOKEN_BYTES, TOKEN_CACHE, TOKEN_LEEWAY_SECONDS
from gateway.presence.limits import SIGN_OUTS_KEPT_SECONDS
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import encode_token, encode_user


class Refused(Exception):
    """A token is not accepted. `reason` is a stable word for metrics; the message is for people and holds no claim."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    @property
    def passing(self) -> bool:
        """Whether it is no fault of the token, which may be accepted in a moment."""
        return self.reason in ("keys_unavailable", "sign_outs_unknown")


class _Verified(NamedTuple):
    """What is remembered of a token: its user, and the key that has signed it."""

    kid: str | None
    user: User


class Verifier:
    """Checks tokens against `keys`; algorithms are fixed by the key, never taken from the token's header.

    PyJWT costs 100 µs a token where the signature itself costs 8, and a reconnect storm brings thousands: tokens that
    were verified are remembered (bounded, emptied when the keys change).

    Args:
        keys: a shared secret or a key set.
        issuer: `iss` a token must carry; None accepts any and none.
        audience: `aud` a token must carry; None accepts any and none.
        sign_outs: users of whom no token is believed that was issued before; None: there are none.
        wall: wall clock in Unix seconds.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        issuer: str | None = None,
        audience: str | None = None,
        sign_outs: SignOuts | None = None,
        wall: Callable[[], float] = time.time,
        cache_size: int = TOKEN_CACHE,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._sign_outs = sign_outs
        self._wall = wall
        self._cache: dict[bytes, _Verified] = {}
        self._cache_size = cache_size
        self._generation = keys.generation
        self._jwt = jwt.PyJWT(options={"enforce_minimum_key_length": True})

    async def verify(self, token: str) -> User:
        """The user that `token` speaks for.

        Raises:
            Refused: it is malformed, forged, expired, for another audience, of a user who was signed out since; or the keys
                cannot be had, or who was signed out is not known.
        """
        if len(token) > TOKEN_BYTES:
            raise Refused("too_long", "the token is too long")
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._cache.get(digest)
        if known is not None:
            await self._key(known.kid)  # keys renewed, or too old to be believed, are noticed by remembered tokens, too
        if self._generation != self._keys.generation:
            self._cache.clear()
            self._generation = self._keys.generation
            known = None
        if known is None:
            known = await self._verify(token)
            self._remember(digest, known)
        if known.user.expires_at <= self._wall():
            self._cache.pop(digest, None)
            raise Refused("expired", "the token has expired")
        self._check_sign_out(known.user)
        return known.user

    def _check_sign_out(self, user: User) -> None:
        sign_outs = self._sign_outs
        if sign_outs is None:
            return
        if not sign_outs.known:
            raise Refused("sign_outs_unknown", "tokens cannot be checked at the moment")
        if user.issued_at and self._wall() - user.issued_at > SIGN_OUTS_KEPT_SECONDS:
            days = SIGN_OUTS_KEPT_SECONDS // 86_400
            raise Refused(
                "too_old", f"the token is older than {days} days: so long it is remembered who was signed out"
            )
        if sign_outs.refuses(user.tenant, user.user, user.issued_at):
            raise Refused("signed_out", "the user was signed out after this token was issued")

    def _remember(self, digest: bytes, verified: _Verified) -> None:
        if len(self._cache) >= self._cache_size:
            del self._cache[next(iter(self._cache))]
        self._cache[digest] = verified

    async def _key(self, kid: str | None) -> Key | None:
        try:
            return await self._keys.find(kid)
        except KeysUnavailable as error:
            raise Refused("keys_unavailable", "tokens cannot be checked at the moment") from error

    async def _verify(self, token: str) -> _Verified:
        try:
            head = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError) as error:
            raise Refused("malformed", "not a JSON Web Token") from error
        kid = head.get("kid")
        if head.get("crit") or (kid is not None and not isinstance(kid, str)):
            raise Refused("malformed", "the token's header is not supported")
        key = await self._key(kid)
        if key is None:
            raise Refused("unknown_key", "the token is signed with an unknown key")
        try:
            payload = self._jwt.decode(
                token,
                key.key,
                algorithms=list(key.algorithms),
                issuer=self._issuer,
                audience=self._audience,
                leeway=TOKEN_LEEWAY_SECONDS,
                options={
                    "require": ["exp", "sub", "tenant"],
                    "verify_aud": self._audience is not None,
                    "verify_iss": self._issuer is not None,
                    "strict_aud": self._audience is not None,
                },
            )
        except jwt.ExpiredSignatureError as error:
            raise Refused("expired", "the token has expired") from error
        except jwt.InvalidSignatureError as error:
            raise Refused("bad_signature", "the token's signature does not fit") from error
        except (jwt.PyJWTError, ValueError) as error:
            raise Refused("invalid", f"the token is not acceptable ({type(error).__name__})") from error
        _refuse_duplicates(token)
        return _Verified(kid, _user(payload))


def _user(payload: dict[str, Any]) -> User:
    user, tenant = payload.get("sub"), payload.get("tenant")
    if not isinstance(user, str) or not isinstance(tenant, str):
        raise Refused("invalid", "`sub` and `tenant` must be text")
    try:
        encode_token(tenant), encode_user(user)
    except InvalidToken as error:
        raise Refused("invalid", "`sub` or `tenant` cannot name a log") from error
    return User(tenant, user, float(payload["exp"]), float(payload.get("iat", 0)))


def _refuse_duplicates(token: str) -> None:
    """A claim given twice is read differently by different parsers: refuse it (RFC 7519, section 4)."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Refused("duplicate_claims", "the token names a claim twice")
        return dict(pairs)

    part = token.split(".")[1]
    try:
        json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)), object_pairs_hook=once)
    except (ValueError, binascii.Error) as error:
        raise Refused("malformed", "not a JSON Web Token") from error


def bearer(header: str | None) -> str | None:
    """The token of an `Authorization: Bearer …` header, or None."""
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
