"""Users' tokens: which of them open a session, and for whom."""

import json
import time
from typing import Any

import pytest

from gateway.access.auth import Refused, Verifier, bearer
from gateway.access.jwks import SharedSecret
from gateway.access.principals import User
from tests.support.tokens import SECRET, by_hand, claims, signed


async def test_a_valid_token_speaks_for_one_user_whatever_scopes_it_names() -> None:
    expires = time.time() + 60
    found = await Verifier(SharedSecret(SECRET)).verify(signed(exp=expires, scope="operator  events:write"))
    assert found == User("acme", "alice", expires)


TIME = 1_800_000_000


def wrong_tokens() -> dict[str, tuple[str, str]]:
    """Token and reason. Made when they are used: most of them are about time."""
    return {
        "no algorithm": (by_hand({"alg": "none", "typ": "JWT"}, claims()), "invalid"),
        "an algorithm the key is not for": (signed(algorithm="HS512", key=SECRET * 2), "invalid"),
        "forged": (signed(key="another secret that is long enough as well"), "bad_signature"),
        "expired": (signed(exp=time.time() - 1), "expired"),
        "expired beyond the leeway": (signed(exp=time.time() - 100), "expired"),
        "no expiry": (signed(exp=None), "invalid"),
        "no subject": (signed(sub=None), "invalid"),
        "no tenant": (signed(tenant=None), "invalid"),
        "tenant of another type": (signed(tenant=["acme"]), "invalid"),
        "a user no log can have": (signed(sub="x" * 200), "invalid"),
        "issued in the future": (signed(iat=time.time() + 600), "invalid"),
        "not yet valid": (signed(nbf=time.time() + 600), "invalid"),
        "critical extension": (by_hand({"alg": "HS256", "crit": ["x"], "x": 1}, claims(), SECRET), "malformed"),
        "kid of another type": (by_hand({"alg": "HS256", "kid": 7}, claims(), SECRET), "malformed"),
        "duplicate claims": (
            by_hand({"alg": "HS256"}, json.dumps(claims())[:-1] + ',"sub":"mallory"}', SECRET),
            "duplicate_claims",
        ),
        "not a token": ("x", "malformed"),
        "empty": ("", "malformed"),
        "not ASCII": ("é.é.é", "malformed"),
        "payload is no object": (by_hand({"alg": "HS256"}, "[]", SECRET), "invalid"),
        "huge": ("x." * 5_000, "too_long"),
    }


@pytest.mark.parametrize("case", wrong_tokens())
async def test_a_token_that_is_not_right_in_every_respect_is_refused(case: str) -> None:
    token, reason = wrong_tokens()[case]
    verifier = Verifier(SharedSecret(SECRET))
    for _ in range(2):  # the second time from whatever was remembered
        with pytest.raises(Refused) as refused:
            await verifier.verify(token)
        assert refused.value.reason == reason
        assert token[:20] not in str(refused.value) or not token


@pytest.mark.parametrize(("more", "accepted"), [
    ({"iss": "us", "aud": "gateway"}, True),
    ({"iss": "them", "aud": "gateway"}, False),
    ({"iss": "us", "aud": "other"}, False),
    ({"iss": "us", "aud": ["gateway", "other"]}, False),
    ({"iss": "us"}, False),
    ({"aud": "gateway"}, False),
])  # fmt: skip
async def test_issuer_and_audience_are_held_to_what_is_configured(more: dict[str, Any], accepted: bool) -> None:
    verifier = Verifier(SharedSecret(SECRET), issuer="us", audience="gateway")
    if accepted:
        await verifier.verify(signed(**more))
    else:
        with pytest.raises(Refused):
            await verifier.verify(signed(**more))


async def test_a_remembered_token_expires_on_time() -> None:
    now = [time.time()]
    verifier = Verifier(SharedSecret(SECRET), wall=lambda: now[0])
    token = signed(exp=now[0] + 60)
    await verifier.verify(token)
    now[0] += 59
    await verifier.verify(token)
    now[0] += 2
    with pytest.raises(Refused) as refused:
        await verifier.verify(token)
    assert refused.value.reason == "expired"


async def test_the_memory_of_tokens_is_bounded() -> None:
    verifier = Verifier(SharedSecret(SECRET), cache_size=3)
    for number in range(10):
        await verifier.verify(signed(sub=f"user{number}"))
    assert len(verifier._cache) == 3


def test_a_short_secret_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="32"):
        SharedSecret("short")


def test_bearer_takes_the_token_of_one_scheme_only() -> None:
    assert bearer("Bearer abc") == "abc"
    assert bearer("bearer  abc ") == "abc"
    assert bearer("Basic abc") is None
    assert bearer("Bearer") is None
    assert bearer(None) is None
