"""Users' tokens, and the secret by which the gateways of tests know them."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt

SECRET = "a secret for tests that is long enough for HS256"


def token(
    user: str = "alice", tenant: str = "default", *, seconds: float = 7200, secret: str = SECRET, **claims: Any
) -> str:
    """A token as the development stack would give out."""
    return jwt.encode(
        {"sub": user, "tenant": tenant, "exp": time.time() + seconds, **claims}, secret, algorithm="HS256"
    )


def bearer(**options: Any) -> dict[str, str]:
    """The header of a request with a token."""
    return {"Authorization": f"Bearer {token(**options)}"}


CLAIMS = {"sub": "alice", "tenant": "acme"}
"""What a token says in tests of tokens, unless they say otherwise; None leaves a claim out."""


def claims(**more: Any) -> dict[str, Any]:
    given = {**CLAIMS, "exp": time.time() + 3600, **more}
    return {name: value for name, value in given.items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **more: Any) -> str:
    return jwt.encode(claims(**more), key, algorithm=algorithm, headers=headers)


def by_hand(header: dict[str, Any] | str, payload: dict[str, Any] | str, key: str | None = None) -> str:
    """A token with any header and payload whatsoever; with `key` the signature fits."""

    def part(value: dict[str, Any] | str) -> str:
        data = value if isinstance(value, str) else json.dumps(value)
        return base64.urlsafe_b64encode(data.encode()).rstrip(b"=").decode()

    text = f"{part(header)}.{part(payload)}"
    digest = hmac.new(key.encode(), text.encode(), hashlib.sha256).digest() if key is not None else b""
    return f"{text}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"
