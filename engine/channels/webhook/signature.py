"""Signatures of Standard Webhooks 1.0: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from engine.directory.webhooks import PREFIX


def message_id(key: str) -> str:
    """The `webhook-id` of a job's key: the same for each attempt, so receivers recognise what they have had.

    It is a hash, since a key holds names of users, which may be of any characters; an id must be a header, and have no full stop.
    """
    return "msg_" + base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()[:24]).decode()


def signature(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """One signature, as `v1,…`.

    Args:
        secret: `whsec_` and base64.
        id: of the message.
        timestamp: of this attempt, in seconds since 1970.
        body: exactly what is sent.
    """
    key = base64.b64decode(secret.removeprefix(PREFIX))
    signed = b".".join((id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def signed_headers(secrets: Sequence[str], id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a message. While a secret is replaced there are two signatures: receivers may know either."""
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signature(secret, id, timestamp, body) for secret in secrets),
    }
