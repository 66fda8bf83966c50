"""The token in an unsubscribe link: who wants no more of what. Nobody else can make one, read it, or turn it into another's.

RFC 8058 (3.1) asks for a part that is hard to forge, as the request comes without a login; and the names of users may be
addresses, so it is encrypted besides. AES-SIV (RFC 5297) needs no nonce: the same link in each mail about the same thing, and a
message that is made again is the same message. There is no expiry: a link of years ago must still work.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

SECRET_CHARS_MIN: Final = 32
TOKEN_CHARS_MAX: Final = 800
"""A line of a mail may have 998 characters, the link and the header's name included."""

_PURPOSE: Final = b"seamark unsubscribe 1"
_LETTERS: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


class Unsubscription(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a token stands for. `category`: the scope of the suppression that it leads to, or `all`."""

    tenant: str
    user: str
    channel: str
    category: str


class TokenRefused(ValueError):
    """It is no token of ours, or not any more. There is nothing more to say to whoever tries."""


class Tokens:
    """Makes and reads tokens.

    Args:
        secrets: the first makes them, all read them: a new one is put in front of the old, which stays as long as its links
            shall work.

    Raises:
        ValueError: there is none, or one of fewer than 32 characters.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        if not secrets or any(len(secret) < SECRET_CHARS_MIN for secret in secrets):
            raise ValueError(
                f"secrets of unsubscribe links need {SECRET_CHARS_MIN} characters: try `openssl rand -base64 48`"
            )
        self._ciphers = [AESSIV(hashlib.sha512(_PURPOSE + secret.encode()).digest()) for secret in secrets]

    def make(self, what: Unsubscription) -> str:
        """The token, in letters that need no escape in a URL.

        Raises:
            ValueError: its names are too long for a line of a mail.
        """
        sealed = self._ciphers[0].encrypt(msgspec.msgpack.encode(what), [_PURPOSE])
        token = base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()
        if len(token) > TOKEN_CHARS_MAX:
            raise ValueError("the names of tenant, user and category are together too long for an unsubscribe link")
        return token

    def read(self, token: str) -> Unsubscription:
        """What a token stands for.

        Raises:
            TokenRefused: nobody who knows one of the secrets has made it.
        """
        if len(token) > TOKEN_CHARS_MAX or _LETTERS.fullmatch(token) is None:
            raise TokenRefused("no token")
        try:
            sealed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except binascii.Error as error:
            raise TokenRefused("no token") from error
        if base64.urlsafe_b64encode(sealed).rstrip(b"=").decode() != token:
            raise TokenRefused("no token")  # the same bytes, written otherwise: one thing has one token
        for cipher in self._ciphers:
            try:
                plain = cipher.decrypt(sealed, [_PURPOSE])
                return msgspec.msgpack.decode(plain, type=Unsubscription)
            except (InvalidTag, ValueError, msgspec.MsgspecError):
                continue
        raise TokenRefused("no token")
