"""Users' tokens, and the secret by which the gateways of tests know them."""

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
