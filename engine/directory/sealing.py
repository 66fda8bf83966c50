"""Secrets of webhooks as PostgreSQL holds them: sealed by a key of the settings (AES-256-GCM), if there is one.

A sealed one is `sealed:<key>:<base64>`, where `<key>` names the key and base64 holds nonce and ciphertext. It is bound to its
endpoint: whoever can write to the table still cannot have another endpoint sign by it. One that was stored before there was a key
is itself.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engine.errors import InvalidSetting, StoreBroken
from engine.settings import Settings

PREFIX: Final = "sealed:"
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
"""As NIST SP 800-38D has it; random ones may seal some four thousand million secrets by a key."""

_VARIABLE: Final = "SEAMARK_STORAGE_KEYS"


class Seal:
    """Seals secrets by the first of its keys, and opens those that any of them has sealed.

    Args:
        keys: of 32 bytes; none: secrets are stored as they are.
    """

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        self._by_name = {_name_of(key): AESGCM(key) for key in keys}
        self.name = next(iter(self._by_name), "")

    def close(self, secret: str, tenant: str, endpoint: str) -> str:
        """`secret` as it is stored for this endpoint."""
        if not self.name:
            return secret
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + self._by_name[self.name].encrypt(nonce, secret.encode(), _about(tenant, endpoint))
        return f"{PREFIX}{self.name}:{base64.b64encode(sealed).decode()}"

    def open(self, stored: str, tenant: str, endpoint: str) -> str:
        """The secret that is stored so for this endpoint.

        Raises:
            StoreBroken: none of the keys opens it. What is said of it names the key, and nothing of the secret.
        """
        if not stored.startswith(PREFIX):
            return stored
        name, _, text = stored.removeprefix(PREFIX).partition(":")
        if name not in self._by_name:
            raise StoreBroken(f"the secret of {endpoint} is sealed by the key {name}", f"Add that key to {_VARIABLE}.")
        try:
            sealed = base64.b64decode(text, validate=True)
            found = self._by_name[name].decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _about(tenant, endpoint))
        except (InvalidTag, binascii.Error, ValueError) as error:
            remedy = "Somebody else has written it: give the endpoint another secret."
            raise StoreBroken(f"the secret of {endpoint} is not what the key {name} has sealed", remedy) from error
        return found.decode()

    def is_newest(self, stored: str) -> bool:
        """Whether it is stored as `close` would store it now."""
        return stored.startswith(f"{PREFIX}{self.name}:") if self.name else not stored.startswith(PREFIX)


PLAIN: Final = Seal()
"""Stores secrets as they are."""


def seal_of(settings: Settings) -> Seal:
    """The seal that `SEAMARK_STORAGE_KEYS` says.

    Raises:
        InvalidSetting: one of its words is no key. It is not repeated.
    """
    found = []
    words = settings.storage_keys.reveal().split() if settings.storage_keys else []
    for number, word in enumerate(words, 1):
        try:
            key = base64.b64decode(word, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) != KEY_BYTES:
            raise InvalidSetting(
                f"{_VARIABLE}: key {number} is not {KEY_BYTES} bytes in base64: openssl rand -base64 32"
            )
        found.append(key)
    return Seal(found)


def _name_of(key: bytes) -> str:
    return hashlib.sha256(b"seamark storage key\n" + key).hexdigest()[:8]


def _about(tenant: str, endpoint: str) -> bytes:
    return f"{tenant}\0{endpoint}".encode()
