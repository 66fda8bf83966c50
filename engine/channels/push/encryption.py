"""Encrypts what browsers get, so that the push services in between read nothing: RFC 8291, on the coding of RFC 8188."""

from __future__ import annotations

import base64
import os
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

BODY_BYTES_MAX: Final = 4096
"""What every push service has to take (RFC 8030, 7.2)."""

_RECORD_BYTES: Final = 4096
_HEADER_BYTES: Final = 16 + 4 + 1 + 65
"""Salt, size of records, and the key id with its length: the sender's public key."""

PLAINTEXT_BYTES_MAX: Final = BODY_BYTES_MAX - _HEADER_BYTES - 1 - 16
"""3993: what is left beside the header, the octet that ends the padding, and the tag of AES-GCM (RFC 8291, 4)."""


class UnusableKeys(ValueError):
    """The keys of a subscription are none: nothing can ever be sent to it."""


def encrypt(
    plaintext: bytes,
    p256dh: str,
    auth: str,
    *,
    private_key: ec.EllipticCurvePrivateKey | None = None,
    salt: bytes | None = None,
) -> bytes:
    """The body of a push message, as one record of the coding `aes128gcm`.

    Args:
        plaintext: at most PLAINTEXT_BYTES_MAX bytes.
        p256dh: the browser's public key, in base64url, a point of P-256 in its uncompressed form.
        auth: the subscription's authentication secret, in base64url.
        private_key, salt: for test vectors only; by default new ones, as RFC 8291, 3.1 demands for each message.

    Raises:
        UnusableKeys: `p256dh` is no point of the curve, or one of both has another length.
        ValueError: the plaintext is longer.
    """
    if len(plaintext) > PLAINTEXT_BYTES_MAX:
        raise ValueError(f"a push message may have {PLAINTEXT_BYTES_MAX} bytes, not {len(plaintext)}")
    receiver, secret = _receiver_key(p256dh), _decoded(auth)
    if len(secret) != 16:
        raise UnusableKeys("`auth` must have 16 bytes")
    sender = private_key or ec.generate_private_key(ec.SECP256R1())
    public = _point(sender.public_key())
    salt = salt or os.urandom(16)
    info = b"WebPush: info\0" + _point(receiver) + public
    material = _derived(sender.exchange(ec.ECDH(), receiver), secret, info, 32)
    key = _derived(material, salt, b"Content-Encoding: aes128gcm\0", 16)
    nonce = _derived(material, salt, b"Content-Encoding: nonce\0", 12)
    header = salt + _RECORD_BYTES.to_bytes(4, "big") + bytes((len(public),)) + public
    return header + AESGCM(key).encrypt(nonce, plaintext + b"\x02", None)


def _derived(material: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, salt, info).derive(material)


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _receiver_key(text: str) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), _decoded(text))
    except ValueError as error:
        raise UnusableKeys("`p256dh` is no point of P-256") from error


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise UnusableKeys("the keys of the subscription are not in base64url") from error
