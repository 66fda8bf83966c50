"""What requests to Amazon's services and messages from them are signed with: Signature Version 4, and the signatures of SNS.

Both are pure, and small beside the library that could do it, which brings an HTTP client and a model of each service of its own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

MESSAGE_AGE_SECONDS_MAX: Final = 3600.0
"""SNS tries again for up to an hour. What is older has been kept by somebody, and is replayed."""

_CERTIFICATE_HOST: Final = re.compile(r"sns\.[a-z0-9-]{3,30}\.amazonaws\.com(\.cn)?", re.ASCII)

_SIGNED: Final[Mapping[str, tuple[str, ...]]] = {
    "Notification": ("Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"),
    "SubscriptionConfirmation": ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"),
    "UnsubscribeConfirmation": ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"),
}
"""Members that a signature covers, in its order; those that are missing are left out."""


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """A key of AWS. `session_token`: of keys that end by themselves."""

    key_id: str
    secret: str
    session_token: str = ""

    def __repr__(self) -> str:
        """Without its secret."""
        return f"Credentials(key_id={self.key_id!r})"


def signed_headers(
    credentials: Credentials,
    *,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    region: str,
    service: str,
    now: datetime,
    method: str = "POST",
) -> dict[str, str]:
    """`headers`, and those that sign the request: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html.

    Args:
        url: without a query.
        headers: sent as they are; all of them are signed.
        now: with an offset. Amazon refuses what is more than 5 minutes off.
    """
    parts = urlsplit(url)
    stamp = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    added = {"X-Amz-Date": stamp}
    if credentials.session_token:
        added["X-Amz-Security-Token"] = credentials.session_token
    signed = {name.lower(): " ".join(value.split()) for name, value in {**headers, **added, "Host": parts.netloc}.items()}
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    request = "\n".join([method, parts.path or "/", "", lines, names, hashlib.sha256(body).hexdigest()])
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret}".encode()
    for part in scope.split("/"):
        key = _hmac(key, part)
    signature = _hmac(key, text).hex()
    added["Authorization"] = f"AWS4-HMAC-SHA256 Credential={credentials.key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**headers, **added}


def certificate_url(message: Mapping[str, Any]) -> str | None:
    """Where the certificate of an SNS message is; None: not at Amazon, so whoever sent the message has made it himself."""
    url = message.get("SigningCertURL")
    if not isinstance(url, str):
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    good = parts.scheme == "https" and _CERTIFICATE_HOST.fullmatch(parts.netloc) and port is None
    return url if good and parts.path.endswith(".pem") and not parts.query and not parts.fragment else None


def is_signed_by_sns(message: Mapping[str, Any], certificate: bytes, *, topic: str, now: datetime) -> bool:
    """Whether an SNS message is genuine, of our topic, and fresh: https://docs.aws.amazon.com/sns/latest/dg/sns-verify-signature-of-message.html.

    Args:
        message: the JSON that was posted. Nothing of it is believed before.
        certificate: PEM, from `certificate_url(message)`, over HTTPS.
        topic: the ARN that is expected; the genuine messages of anybody else's topic are refused.
        now: with an offset.
    """
    kind = message.get("Type")
    members = _SIGNED.get(kind) if isinstance(kind, str) else None
    digest = {"1": hashes.SHA1(), "2": hashes.SHA256()}.get(str(message.get("SignatureVersion")))  # noqa: S303 - SNS's version 1
    if members is None or digest is None or message.get("TopicArn") != topic or not _is_fresh(message, now):
        return False
    text = "".join(f"{name}\n{message[name]}\n" for name in members if message.get(name) is not None)
    try:
        found = x509.load_pem_x509_certificate(certificate)
        key = found.public_key()
        if not isinstance(key, rsa.RSAPublicKey) or not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
            return False
        key.verify(base64.b64decode(str(message.get("Signature")), validate=True), text.encode(), padding.PKCS1v15(), digest)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


def _is_fresh(message: Mapping[str, Any], now: datetime) -> bool:
    try:
        at = datetime.fromisoformat(str(message.get("Timestamp")))
    except ValueError:
        return False
    return at.tzinfo is not None and abs(now - at) <= timedelta(seconds=MESSAGE_AGE_SECONDS_MAX)


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()
