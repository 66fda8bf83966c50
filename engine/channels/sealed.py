"""Tokens that stand for something of ours in the hands of others: nobody else can make one, read it, or turn it into another's.

They are encrypted besides being signed, as the names of users may be addresses. AES-SIV (RFC 5297) needs no nonce: the same thing
has the same token each time, so a message that is made again is the same message. A token has no end of its own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

SECRET_CHARS_MIN: Final = 32

_LETTERS: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

T = TypeVar("T")


class TokenRefused(ValueError):
    """It is no token of ours, or not any more. There is nothing more to say to whoever tries."""


class Sealer(Generic[T]):
    """Makes and reads tokens of one purpose; those of another are refused, although the secrets are the same.

    Args:
        secrets: the first makes them, all read them: a new one is put in front of the old, which stays as long as its tokens
            shall work.
        purpose: what they are for.
        form: what they stand for.
        chars_max: of a token.

    Raises:
        ValueError: there is no secret, or one of fewer than 32 characters.
    """

    def __init__(self, secrets: Sequence[str], *, purpose: bytes, form: type[T], chars_max: int) -> None:
        if not secrets or any(len(secret) < SECRET_CHARS_MIN for secret in secrets):
            raise ValueError(
                f"secrets of unsubscribe links need {SECRET_CHARS_MIN} characters: try `openssl rand -base64 48`"
            )
        self._ciphers = [AESSIV(hashlib.sha512(purpose + secret.encode()).digest()) for secret in secrets]
        self._purpose, self._form, self._chars_max = purpose, form, chars_max

    def make(self, what: T) -> str:
        """The token, in letters that need no escape in a URL.

        Raises:
            ValueError: it would be too long.
        """
        sealed = self._ciphers[0].encrypt(msgspec.msgpack.encode(what), [self._purpose])
        token = base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()
        if len(token) > self._chars_max:
            raise ValueError("the names of tenant, user and category are together too long for a token")
        return token

    def read(self, token: str) -> T:
        """What a token stands for.

        Raises:
            TokenRefused: nobody who knows one of the secrets has made it.
        """
        if len(token) > self._chars_max or _LETTERS.fullmatch(token) is None:
            raise TokenRefused("no token")
        try:
            sealed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except binascii.Error as error:
            raise TokenRefused("no token") from error
        if base64.urlsafe_b64encode(sealed).rstrip(b"=").decode() != token:
            raise TokenRefused("no token")  # the same bytes, written otherwise: one thing has one token
        for cipher in self._ciphers:
            try:
                return msgspec.msgpack.decode(cipher.decrypt(sealed, [self._purpose]), type=self._form)
            except (InvalidTag, ValueError, msgspec.MsgspecError):
                continue
        raise TokenRefused("no token")
