"""Key sets of an issuer: which keys are believed, how soon a new one is, and for how long while the issuer is away."""

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any, Self

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gateway.access import jwks
from gateway.access.auth import Refused, Verifier
from gateway.access.jwks import KeySet, KeysUnavailable
from tests.support.tokens import SECRET, by_hand, claims, signed


@pytest.fixture(scope="module")
def rsa_keys() -> Sequence[rsa.RSAPrivateKey]:
    return [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]


def public(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name("ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256")
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig", **more}


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
