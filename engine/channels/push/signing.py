"""Short-lived tokens that we sign ourselves: for APNs and for Web Push (VAPID), both JWTs with ES256.

Apple answers `TooManyProviderTokenUpdates` to a key that comes with new tokens more often than every 20 minutes, and all workers
use the same key. So a token is a function of its key and the window of time that it is of: the times in it are those of the
window, and the signature is the deterministic one (RFC 6979). Workers then have the same token without telling one another.
"""

from __future__ import annotations

import base64
from typing import Any, Final

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
)

from engine.errors import InvalidSetting

APNS_WINDOW_SECONDS: Final = 40 * 60
"""Apple takes tokens that are 20 to 60 minutes old when they are replaced; a clock may be wrong by 20 minutes then."""

APNS_RENEWED_SECONDS_MIN: Final = 20 * 60
"""A token that is younger is not replaced, whatever Apple says of it."""

VAPID_WINDOW_SECONDS: Final = 6 * 3600
VAPID_VALID_SECONDS: Final = 18 * 3600
"""From the window's begin. RFC 8292, 2 allows 24 h from now; a clock may be wrong by hours."""


def base64url(data: bytes) -> str:
    """Without padding, as JWTs and push services have it."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def es256_key(setting: str, text: str) -> ec.EllipticCurvePrivateKey:
    """A private key of P-256: in PEM (Apple's .p8), or the 32 bytes of its number in base64url (usual for VAPID), or DER in it.

    Raises:
        InvalidSetting: names `setting`; the key is not repeated.
    """
    try:
        key = load_pem_private_key(text.encode(), None) if "-----BEGIN" in text else _bare_key(text.strip())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidSetting(
            f"{setting} is no private key: give the PEM file of a key of P-256, or its number in base64url"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidSetting(f"{setting} is a key of another kind: ES256 needs one of P-256")
    return key


def _bare_key(text: str) -> Any:
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if len(data) == 32:
        return ec.derive_private_key(int.from_bytes(data, "big"), ec.SECP256R1())
    return load_der_private_key(data, None)


def es256_token(key: ec.EllipticCurvePrivateKey, claims: dict[str, Any], header: dict[str, str]) -> str:
    """A JWT (RFC 7519) that is the same each time for the same key, claims and header.

    PyJWT cannot be asked for deterministic signatures.
    """
    parts = (msgspec.json.encode({"alg": "ES256", **header}), msgspec.json.encode(claims))
    signed = ".".join(map(base64url, parts))
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return f"{signed}.{base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


class ApnsToken:
    """The token of one key of APNs, for all connections of the process, and the same in every process.

    Args:
        key: of the developer account. key_id, team_id: ten characters each, Apple's names for both.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, key_id: str, team_id: str) -> None:
        self._key = key
        self._key_id = key_id
        self._team_id = team_id
        self._issued_at = 0
        self._token = ""

    def get(self, now: float) -> str:
        """The token that is in force. `now`: seconds since 1970."""
        window = int(now // APNS_WINDOW_SECONDS) * APNS_WINDOW_SECONDS
        # One that was renewed late in its window stays for the next. A clock that is put back a little brings no old one back.
        if (
            not self._token
            or window - self._issued_at >= APNS_RENEWED_SECONDS_MIN
            or self._issued_at - now > APNS_WINDOW_SECONDS
        ):
            self._issue(window)
        return self._token

    def renew(self, used: str, now: float) -> bool:
        """Replace the token that Apple calls expired; whether another one is in force.

        Args:
            used: the token that was refused. Requests that were under way together are refused together, and one replacement is
                enough for them.

        False: it is too young to be replaced, so the clock must be wrong.
        """
        if used == self._token:
            if now - self._issued_at < APNS_RENEWED_SECONDS_MIN:
                return False
            self._issue(int(now))
        return True

    def _issue(self, at: int) -> None:
        claims = {"iss": self._team_id, "iat": at}
        self._token = es256_token(self._key, claims, {"kid": self._key_id})
        self._issued_at = at


class VapidTokens:
    """The tokens that tell push services who we are (RFC 8292): one for each origin, the same in every process.

    Args:
        key: whose public half the browsers subscribed with. subject: `mailto:` or `https:`, where the push service finds us.
    """

    ORIGINS_MAX: Final = 256
    """Origins whose token is kept; push services have a handful of them. More are signed each time."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, subject: str) -> None:
        self._key = key
        self._subject = subject
        self._window = -1
        self._tokens: dict[str, str] = {}
        self.public_key = base64url(key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
        """What browsers subscribe with: `applicationServerKey`."""

    def authorization(self, origin: str, now: float) -> str:
        """The header `Authorization` for a push service. `now`: seconds since 1970."""
        window = int(now // VAPID_WINDOW_SECONDS) * VAPID_WINDOW_SECONDS
        if window != self._window:
            self._window, self._tokens = window, {}
        token = self._tokens.get(origin)
        if token is None:
            claims = {"aud": origin, "exp": window + VAPID_VALID_SECONDS, "sub": self._subject}
            token = es256_token(self._key, claims, {"typ": "JWT"})
            if len(self._tokens) < self.ORIGINS_MAX:
                self._tokens[origin] = token
        return f"vapid t={token}, k={self.public_key}"
