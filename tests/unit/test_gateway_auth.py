"""Tokens, keys and origins: who may open a session."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from typing import Any, Self

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gateway.access import jwks
from gateway.access.api_keys import ApiKeys, Holder, KeysAway, PostgresKeys, TooManyGuesses
from gateway.access.auth import Refused, Verifier, bearer
from gateway.access.jwks import KeySet, KeysUnavailable, SharedSecret
from gateway.access.origins import Origins
from gateway.access.principals import Service, User
from gateway.limits import API_KEY_RETRY_SECONDS, API_KEY_STALE_SECONDS
from tests.support.tokens import SECRET

CLAIMS = {"sub": "alice", "tenant": "acme"}


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


@pytest.fixture(scope="module")
def rsa_keys() -> Sequence[rsa.RSAPrivateKey]:
    return [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]


def public(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name("ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256")
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig", **more}


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


# --- key sets -------------------------------------------------------------------------------------------------------


class Issuer:
    """A JWKS endpoint on a real socket. While `speaks` is cleared it takes requests and does not answer."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0
        self.body: bytes | None = None
        self.speaks = asyncio.Event()
        self.speaks.set()

    async def __aenter__(self) -> Self:
        async def handler(_: web.Request) -> web.Response:
            self.asked += 1
            await asyncio.sleep(0.01)
            await self.speaks.wait()
            body = self.body if self.body is not None else json.dumps({"keys": self.keys}).encode()
            return web.Response(body=body, status=self.status)

        app = web.Application()
        app.router.add_get("/jwks", handler)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site.port}/jwks"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.speaks.set()
        await self.runner.cleanup()


async def renewed(keys: KeySet) -> None:
    """Returns once the set that is renewed behind its users is there."""
    if keys._fetching is not None:
        await asyncio.shield(keys._fetching)


async def test_keys_rotate_without_a_restart_and_the_old_one_works_while_it_is_listed(
    rsa_keys: Sequence[rsa.RSAPrivateKey],
) -> None:
    old, new = rsa_keys
    now = [1_000.0]
    async with Issuer() as issuer:
        issuer.keys = [public(old, "old")]
        keys = KeySet(issuer.url, now=lambda: now[0])
        verifier = Verifier(keys)
        by_old = signed(old, "RS256", {"kid": "old"})
        by_new = signed(new, "RS256", {"kid": "new"})
        await verifier.verify(by_old)
        with pytest.raises(Refused):
            await verifier.verify(by_new)
        issuer.keys = [public(old, "old"), public(new, "new")]
        now[0] += jwks.JWKS_COOLDOWN_SECONDS + 1
        await verifier.verify(by_new)
        await verifier.verify(by_old)
        issuer.keys = [public(new, "new")]
        now[0] += jwks.JWKS_FRESH_SECONDS + 1
        await verifier.verify(signed(new, "RS256", {"kid": "new"}, scope="x"))
        await renewed(keys)
        with pytest.raises(Refused) as refused:  # remembered under the old keys, and forgotten with them
            await verifier.verify(by_old)
        assert refused.value.reason == "unknown_key"
        await keys.close()


@pytest.mark.parametrize("kid", ["k", ""])
async def test_a_token_of_a_key_that_was_replaced_under_its_name_is_forgotten_with_it(
    rsa_keys: Sequence[rsa.RSAPrivateKey], kid: str
) -> None:
    old, new = rsa_keys
    now = [1_000.0]
    head = {"kid": kid} if kid else {}
    async with Issuer() as issuer:
        issuer.keys = [public(old, kid)]
        keys = KeySet(issuer.url, now=lambda: now[0])
        verifier = Verifier(keys)
        by_old = signed(old, "RS256", head)
        for _ in range(3):  # remembered, under the keys as they were fetched
            await verifier.verify(by_old)
        issuer.keys = [public(new, kid)]
        now[0] += jwks.JWKS_FRESH_SECONDS + 1
        await keys.find(kid or None)
        await renewed(keys)
        await verifier.verify(signed(new, "RS256", head))
        with pytest.raises(Refused):
            await verifier.verify(by_old)
        await keys.close()


async def test_a_flood_of_unknown_key_ids_costs_one_fetch(rsa_keys: Sequence[rsa.RSAPrivateKey]) -> None:
    async with Issuer() as issuer:
        issuer.keys = [public(rsa_keys[0], "known")]
        keys = KeySet(issuer.url)
        verifier = Verifier(keys)
        tokens = [signed(rsa_keys[1], "RS256", {"kid": f"unknown{number}"}) for number in range(50)]
        results = await asyncio.gather(*(verifier.verify(token) for token in tokens), return_exceptions=True)
        assert {getattr(result, "reason", None) for result in results} == {"unknown_key"}
        assert issuer.asked == 1
        await keys.close()


async def test_a_silent_issuer_stalls_nobody_whose_key_is_known(rsa_keys: Sequence[rsa.RSAPrivateKey]) -> None:
    now = [1_000.0]
    async with Issuer() as issuer:
        issuer.keys = [public(rsa_keys[0], "k")]
        keys = KeySet(issuer.url, now=lambda: now[0])
        token = signed(rsa_keys[0], "RS256", {"kid": "k"})
        await Verifier(keys).verify(token)
        issuer.speaks.clear()
        now[0] += jwks.JWKS_FRESH_SECONDS + 1
        for _ in range(100):
            await Verifier(keys).verify(token)
        assert keys._fetching is not None, "somebody waited until the silent issuer was given up"
        issuer.speaks.set()
        await renewed(keys)
        assert issuer.asked == 2
        await keys.close()


async def test_a_new_key_is_believed_as_soon_as_it_is_published(rsa_keys: Sequence[rsa.RSAPrivateKey]) -> None:
    now = [1_000.0]
    async with Issuer() as issuer:
        issuer.keys = [public(rsa_keys[0], "old")]
        keys = KeySet(issuer.url, now=lambda: now[0])
        verifier, by_new = Verifier(keys), signed(rsa_keys[1], "RS256", {"kid": "new"})
        await verifier.verify(signed(rsa_keys[0], "RS256", {"kid": "old"}))
        issuer.keys.append(public(rsa_keys[1], "new"))
        now[0] += 2
        with pytest.raises(Refused) as refused:
            await verifier.verify(by_new)
        assert refused.value.reason == "keys_unavailable"  # come again; not: this token is none
        now[0] += 5
        assert (await verifier.verify(by_new)).user == "alice"
        await keys.close()


async def test_a_token_of_a_foreign_issuer_is_refused_for_good_and_not_put_off(
    rsa_keys: Sequence[rsa.RSAPrivateKey],
) -> None:
    now = [1_000.0]
    async with Issuer() as issuer:
        issuer.keys = [public(rsa_keys[0], "k")]
        keys = KeySet(issuer.url, now=lambda: now[0])
        verifier, foreign = Verifier(keys), signed(rsa_keys[1], "RS256", {"kid": "foreign"})
        for _ in range(60):
            with pytest.raises(Refused) as refused:
                await verifier.verify(foreign)
            assert refused.value.reason == "unknown_key"
            now[0] += 1
        assert issuer.asked <= 12
        await keys.close()


async def test_one_broken_key_of_a_set_does_not_cost_the_others(rsa_keys: Sequence[rsa.RSAPrivateKey]) -> None:
    async with Issuer() as issuer:
        point = {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA", "kid": "e"}
        issuer.keys = [{"kty": []}, {"kty": "RSA", "n": 7, "e": None}, point, public(rsa_keys[0], "k")]
        keys = KeySet(issuer.url)
        assert (await Verifier(keys).verify(signed(rsa_keys[0], "RS256", {"kid": "k"}))).user == "alice"
        await keys.close()


async def test_a_token_signed_with_the_public_key_as_a_secret_is_refused(rsa_keys: Sequence[rsa.RSAPrivateKey]) -> None:
    key = rsa_keys[0]
    pem = (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )
    async with Issuer() as issuer:
        issuer.keys = [
            public(key, "k"),
            {"kty": "oct", "k": base64.urlsafe_b64encode(SECRET.encode()).decode(), "kid": "o"},
        ]
        keys = KeySet(issuer.url)
        verifier = Verifier(keys)
        for token in (by_hand({"alg": "HS256", "kid": "k"}, claims(), pem), signed(headers={"kid": "o"})):
            with pytest.raises(Refused):
                await verifier.verify(token)
        await keys.close()


async def test_elliptic_keys_and_a_single_key_without_an_id_work() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    async with Issuer() as issuer:
        issuer.keys = [public(key, "", alg="ES256")]
        keys = KeySet(issuer.url)
        assert (await Verifier(keys).verify(signed(key, "ES256"))).user == "alice"
        await keys.close()


async def test_a_key_set_that_cannot_be_renewed_is_used_for_an_hour_and_then_nothing_is_believed(
    rsa_keys: Sequence[rsa.RSAPrivateKey],
) -> None:
    now = [1_000.0]
    async with Issuer() as issuer:
        issuer.keys = [public(rsa_keys[0], "k")]
        keys = KeySet(issuer.url, now=lambda: now[0])
        remembering, token = Verifier(keys), signed(rsa_keys[0], "RS256", {"kid": "k"})
        assert (await remembering.verify(token)).user == "alice"
        for status, body in ((500, None), (200, b"not json"), (200, b'{"keys":[]}'), (200, b"x" * 300_000)):
            issuer.status, issuer.body = status, body
            now[0] += jwks.JWKS_FRESH_SECONDS + 1
            assert await keys.find("k") is not None
            await renewed(keys)
        assert issuer.asked == 5
        now[0] += jwks.JWKS_STALE_SECONDS
        with pytest.raises(KeysUnavailable):
            await keys.find("k")
        for verifier in (remembering, Verifier(keys)):
            with pytest.raises(Refused) as refused:
                await verifier.verify(token)
            assert refused.value.reason == "keys_unavailable"
        await keys.close()


async def test_a_remembered_token_is_refused_once_its_key_has_left_the_set(
    rsa_keys: Sequence[rsa.RSAPrivateKey],
) -> None:
    now = [1_000.0]
    async with Issuer() as issuer:
        issuer.keys = [public(rsa_keys[0], "k")]
        keys = KeySet(issuer.url, now=lambda: now[0])
        verifier, token = Verifier(keys), signed(rsa_keys[0], "RS256", {"kid": "k"})
        assert (await verifier.verify(token)).user == "alice"
        issuer.keys = [public(rsa_keys[1], "other")]
        now[0] += jwks.JWKS_FRESH_SECONDS + 1
        await verifier.verify(token)  # nobody else comes with a token that makes the set be fetched
        await renewed(keys)
        with pytest.raises(Refused) as refused:
            await verifier.verify(token)
        assert refused.value.reason == "unknown_key"
        await keys.close()


# --- API keys -------------------------------------------------------------------------------------------------------


class Table(PostgresKeys):
    """A store of keys that can go away."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Holder] = {}
        self.asked = 0
        self.away = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def find(self, key_hash: bytes) -> Holder | None:
        self.asked += 1
        await asyncio.sleep(0)
        await self.answers.wait()
        if self.away:
            raise OSError("away")
        return self.rows.get(key_hash)

    async def close(self) -> None:
        pass


async def looked_up(keys: ApiKeys) -> None:
    """Returns once no look-up is under way."""
    await asyncio.gather(*keys._asking.values(), return_exceptions=True)


async def test_an_api_key_known_or_not_is_asked_for_once_a_minute() -> None:

    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    assert await asyncio.gather(*(keys.find("k") for _ in range(20))) == [None] * 20
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset({"events:write"}))
    assert await keys.find("k") is None
    assert table.asked == 1
    now[0] = 61
    found = await keys.find("k")
    assert found is not None
    assert isinstance(found, Service)
    table.rows.clear()
    assert await keys.find("k") is not None
    now[0] = 122
    assert await keys.find("k") is None
    assert table.asked == 3


async def test_while_the_store_is_away_keys_seen_before_go_on_and_others_do_not() -> None:

    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.away = True
    now[0] = 800
    assert await keys.find("k") is not None
    with pytest.raises(KeysAway):
        await keys.find("other")
    table.away = False
    assert await keys.find("other") is None


async def test_a_key_that_cannot_be_confirmed_for_a_quarter_of_an_hour_is_believed_no_longer() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    key_hash = hashlib.sha256(b"k").digest()
    table.rows[key_hash] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.away = True
    for second in range(0, int(API_KEY_STALE_SECONDS), 10):
        now[0] = second
        assert await keys.find("k") is not None
    now[0] = API_KEY_STALE_SECONDS
    with pytest.raises(KeysAway):
        await keys.find("k")
    table.away = False
    now[0] += API_KEY_RETRY_SECONDS
    with pytest.raises(KeysAway):  # looked up behind this one
        await keys.find("k")
    await looked_up(keys)
    assert await keys.find("k") is not None


async def test_a_key_revoked_while_the_store_was_away_ends_once_it_is_back() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.away = True
    now[0] = 100
    assert await keys.find("k") is not None
    table.away = False
    table.rows.clear()
    now[0] += API_KEY_RETRY_SECONDS
    await keys.find("k")
    await looked_up(keys)
    assert await keys.find("k") is None


async def test_a_key_that_is_used_is_confirmed_behind_its_requests() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    await keys.find("k")
    table.answers.clear()
    now[0] = 31
    async with asyncio.timeout(30):  # the store does not answer
        assert await keys.find("k") is not None
        while table.asked < 2:
            await asyncio.sleep(0)
    table.answers.set()


async def test_the_time_of_a_key_ends_while_it_is_remembered_and_while_the_store_is_away() -> None:
    now, table, expires_at = [0.0], Table(), time.time() + 60
    wall = [time.time()]
    keys = ApiKeys(table, now=lambda: now[0], wall=lambda: wall[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset(), expires_at)
    assert await keys.find("k") is not None
    table.away = True
    wall[0] = expires_at
    assert await keys.find("k") is None


async def test_keys_never_seen_before_reach_the_store_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_PER_MINUTE", 60)
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_AT_ONCE", 60)
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    found = await asyncio.gather(*(keys.find(f"guess{number}") for number in range(500)), return_exceptions=True)
    assert table.asked == 60
    assert sum(isinstance(one, KeysAway) for one in found) == 500 - 59
    now[0] = 61
    assert await keys.find("k") is not None
    assert table.asked == 61


async def test_an_address_that_guesses_keys_uses_up_no_look_ups_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_PER_MINUTE", 20)
    monkeypatch.setattr("gateway.access.api_keys.API_KEY_FIRST_AT_ONCE", 20)
    table = Table()
    keys = ApiKeys(table, guesses_per_minute=10, now=lambda: 0.0)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    guesses = (keys.find(f"guess{number}", lambda: "1.2.3.4") for number in range(100))
    await asyncio.gather(*guesses, return_exceptions=True)
    assert await keys.find("k", lambda: "5.6.7.8") is not None


async def test_an_address_that_guesses_keys_is_stopped_and_no_other_one() -> None:
    table = Table()
    keys = ApiKeys(table, guesses_per_minute=10, now=lambda: 0.0)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    guesses = (keys.find(f"guess{number}", lambda: "1.2.3.4") for number in range(100))
    found = await asyncio.gather(*guesses, return_exceptions=True)
    assert sum(isinstance(one, TooManyGuesses) for one in found) == 90
    with pytest.raises(TooManyGuesses):
        await keys.find("k", lambda: "1.2.3.4")
    assert table.asked == 10
    for _ in range(30):
        assert await keys.find("k", lambda: "5.6.7.8") is not None
    assert await keys.find("k", lambda: "1.2.3.4") is not None  # it is known now


async def test_a_service_that_begins_with_many_requests_at_once_is_not_taken_for_one_that_guesses() -> None:
    table = Table()
    keys = ApiKeys(table, guesses_per_minute=10, now=lambda: 0.0)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    found = await asyncio.gather(*(keys.find("k", lambda: "1.2.3.4") for _ in range(100)))
    assert all(one is not None for one in found)
    assert table.asked == 1
    # A key that is none costs one guess, however often it comes at once.
    assert await asyncio.gather(*(keys.find("guess", lambda: "1.2.3.4") for _ in range(100))) == [None] * 100
    for number in range(9):
        assert await keys.find(f"guess{number}", lambda: "1.2.3.4") is None
    with pytest.raises(TooManyGuesses):
        await keys.find("one more", lambda: "1.2.3.4")


async def test_a_flood_of_unknown_api_keys_pushes_out_none_that_is_used() -> None:
    table = Table()
    keys = ApiKeys(table, cache_size=3)
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    for number in range(10):
        assert await keys.find(f"guess{number}") is None
    table.away = True
    assert await keys.find("k") is not None


async def test_a_revoked_api_key_is_not_remembered_as_a_known_one() -> None:
    now, table = [0.0], Table()
    keys = ApiKeys(table, now=lambda: now[0])
    table.rows[hashlib.sha256(b"k").digest()] = Service("acme", frozenset())
    assert await keys.find("k") is not None
    table.rows.clear()
    for at in (100, 101):
        now[0] = at
        assert await keys.find("k") is None


async def test_the_memory_of_api_keys_is_bounded() -> None:
    table = Table()
    keys = ApiKeys(table, cache_size=3)
    for number in range(10):
        table.rows[hashlib.sha256(b"k%d" % number).digest()] = Service("acme", frozenset())
        await keys.find(f"k{number}")
        await keys.find(f"unknown{number}")
    assert (len(keys._known), len(keys._unknown)) == (3, 3)
    assert await keys.find("x" * 10_000) is None


# --- origins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("origin", "allowed"), [
    ("https://app.example", True), ("https://app.example:443", False), ("http://app.example", False),
    ("https://app.example.evil", False), ("https://evil-app.example", False), ("https://sub.app.example", False),
    ("null", False), ("", False), (None, True),
])  # fmt: skip
def test_an_origin_is_compared_exactly(origin: str | None, allowed: bool) -> None:
    assert Origins(["https://app.example"]).allows(origin, "app.example") is allowed


@pytest.mark.parametrize(("origin", "host", "allowed"), [
    ("http://127.0.0.1:8080", "127.0.0.1:8080", True), ("http://localhost:8080", "localhost:8080", True),
    ("http://[::1]:8080", "[::1]:8080", True), ("http://192.168.1.5", "192.168.1.5", True),
    ("http://127.0.0.1:9090", "127.0.0.1:8080", False), ("https://127.0.0.1:8080", "127.0.0.1:8080", False),
    ("http://evil.example:8080", "evil.example:8080", False), ("http://[:8080", "[:8080", False), ("http://", "", False),
])  # fmt: skip
def test_the_development_page_may_connect_to_its_own_server_under_no_name_that_others_can_give(
    origin: str, host: str, allowed: bool
) -> None:
    assert Origins(same_origin=True).allows(origin, host) is allowed
    assert not Origins().allows(origin, host)


def test_where_origins_are_configured_no_other_is_allowed() -> None:
    origins = Origins(["https://app.example"], same_origin=True)
    assert origins.allows("https://app.example", "127.0.0.1:8080")
    assert not origins.allows("http://127.0.0.1:8080", "127.0.0.1:8080")


@pytest.mark.parametrize("entry", ["*", "https://*.example", "https://app.example/", "app.example", "https://", ""])
def test_an_entry_that_is_no_origin_is_refused_at_start(entry: str) -> None:
    with pytest.raises(ValueError, match="not an origin"):
        Origins([entry])
