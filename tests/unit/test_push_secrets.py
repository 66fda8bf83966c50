"""Tokens that are signed, keys that are read, and what browsers alone can decrypt."""

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.push.encryption import BODY_BYTES_MAX, PLAINTEXT_BYTES_MAX, UnusableKeys, encrypt
from engine.channels.push.oauth import service_account
from engine.channels.push.signing import ApnsToken, VapidTokens, base64url, es256_key
from engine.errors import InvalidSetting
from ops.dev.providers.webpush import Browser
from tests.support.pushing import account_file

KEY = ec.generate_private_key(ec.SECP256R1())
HOUR = 3600.0


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def claims_of(token: str, key: ec.EllipticCurvePrivateKey = KEY, **options: Any) -> dict[str, Any]:
    unchecked = {"verify_exp": False, "verify_iat": False, "verify_aud": False}
    return jwt.decode(token, key.public_key(), algorithms=["ES256"], options=unchecked, **options)  # type: ignore[arg-type]


def test_the_example_of_rfc_8291_comes_out_byte_by_byte() -> None:
    """RFC 8291, 5 and appendix A."""
    body = encrypt(
        b"When I grow up, I want to be a watermelon",
        "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
        "BTBZMqHH6r4Tts7J_aSIgg",
        private_key=es256_key("key", "yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw"),
        salt=decoded("DGv6ra1nlYgDCS1FRnbzlw"),
    )
    assert base64url(body) == (
        "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_yl95bQpu6cVPTpK4M"
        "qgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN"
    )


@given(st.binary(max_size=PLAINTEXT_BYTES_MAX))
def test_only_the_browser_it_is_for_reads_it_and_no_body_is_longer_than_services_take(plaintext: bytes) -> None:
    browser, other = Browser("", ""), Browser("", "")
    body = encrypt(plaintext, browser.p256dh, browser.auth)
    assert len(body) <= BODY_BYTES_MAX
    assert browser.decrypt(body) == plaintext
    with pytest.raises(InvalidTag):
        other.decrypt(body)


def test_the_longest_plaintext_makes_the_longest_body_and_one_byte_more_is_refused() -> None:
    browser = Browser("", "")
    assert len(encrypt(b"x" * PLAINTEXT_BYTES_MAX, browser.p256dh, browser.auth)) == BODY_BYTES_MAX
    with pytest.raises(ValueError, match="3993"):
        encrypt(b"x" * (PLAINTEXT_BYTES_MAX + 1), browser.p256dh, browser.auth)


def test_the_same_text_never_looks_the_same_twice() -> None:
    browser = Browser("", "")
    assert encrypt(b"hi", browser.p256dh, browser.auth)[:86] != encrypt(b"hi", browser.p256dh, browser.auth)[:86]


@pytest.mark.parametrize(
    ("p256dh", "auth"),
    [
        (base64url(b"\x04" + b"\x01" * 64), base64url(b"a" * 16)),  # no point of the curve
        (base64url(b"\x04" * 64), base64url(b"a" * 16)),
        (Browser("", "").p256dh, base64url(b"a" * 15)),
        ("!!", base64url(b"a" * 16)),
    ],
    ids=["no point of the curve", "its bytes are none", "a short secret", "not base64"],
)
def test_keys_that_are_none_are_said_to_be(p256dh: str, auth: str) -> None:
    with pytest.raises(UnusableKeys):
        encrypt(b"hi", p256dh, auth)


def test_all_workers_have_the_same_apns_token_without_telling_one_another() -> None:
    one, other = ApnsToken(KEY, "K", "T"), ApnsToken(KEY, "K", "T")
    at = 1_000 * 2400.0
    assert {one.get(at + 1), one.get(at + 2399), other.get(at + 1200)} == {other.get(at)}
    assert one.get(at + 2400) != other.get(at)


@given(st.floats(0, 2e9), st.lists(st.tuples(st.floats(0, 3 * HOUR), st.booleans()), max_size=30))
def test_an_apns_token_is_never_an_hour_old_nor_replaced_within_20_minutes(
    start: float, steps: list[tuple[float, bool]]
) -> None:
    """Whatever Apple calls expired, and whenever it does."""
    token, now, issued = ApnsToken(KEY, "K", "T"), start, []
    for pause, called_expired in steps:
        now += pause
        used = token.get(now)
        at = claims_of(used)["iat"]
        assert now - HOUR < at <= now
        if issued and at != issued[-1]:
            assert at - issued[-1] >= 1200
        issued.append(at)
        if called_expired:
            replaced = token.renew(used, now)
            assert replaced is (now - at >= 1200)
            assert (token.get(now) != used) is replaced


def test_requests_that_were_refused_together_replace_the_token_once() -> None:
    token, now = ApnsToken(KEY, "K", "T"), 1_000 * 2400.0 + 1500
    used = token.get(now)
    assert token.renew(used, now)
    replaced = token.get(now)
    assert token.renew(used, now + 1), "another one is in force, that is all they need to know"
    assert token.get(now + 1) == replaced


def test_apns_tokens_carry_what_apple_asks_for() -> None:
    token = ApnsToken(KEY, "KEY4567890", "TEAM567890").get(5_000_000.0)
    assert jwt.get_unverified_header(token) == {"alg": "ES256", "kid": "KEY4567890"}
    claims = claims_of(token, issuer="TEAM567890")
    assert set(claims) == {"iss", "iat"}


@given(st.floats(0, 4e9))
def test_a_vapid_token_counts_for_at_least_12_and_at_most_18_hours(now: float) -> None:
    tokens = VapidTokens(KEY, "mailto:ops@example.com")
    header = tokens.authorization("https://push.example", now)
    token, key = header.removeprefix("vapid t=").split(", k=")
    claims = claims_of(token)
    assert (claims["aud"], claims["sub"]) == ("https://push.example", "mailto:ops@example.com")
    assert 12 * HOUR <= claims["exp"] - now <= 18 * HOUR
    assert key == tokens.public_key
    assert tokens.authorization("https://push.example", now) == header
    assert tokens.authorization("https://other.example", now) != header


def test_origins_without_number_do_not_fill_the_memory() -> None:
    tokens = VapidTokens(KEY, "mailto:ops@example.com")
    for count in range(VapidTokens.ORIGINS_MAX + 10):
        tokens.authorization(f"https://push{count}.example", 1e9)
    assert len(tokens._tokens) == VapidTokens.ORIGINS_MAX


def test_keys_are_read_in_every_form_that_tools_write() -> None:
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    der = base64url(KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
    bare = base64url(KEY.private_numbers().private_value.to_bytes(32, "big"))
    for text in (pem, der, bare, bare + "=\n"):
        assert es256_key("key", text).private_numbers() == KEY.private_numbers()


@pytest.mark.parametrize("kind", ["garbage", "rsa", "p384", "zero"])
def test_a_key_that_is_none_is_named_by_its_setting_and_not_repeated(kind: str) -> None:
    other = {"rsa": rsa.generate_private_key(65537, 2048), "p384": ec.generate_private_key(ec.SECP384R1())}
    if kind in other:
        text = other[kind].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()  # type: ignore[attr-defined]
    else:
        text = {"garbage": "c2VjcmV0 not a key", "zero": base64url(bytes(32))}[kind]
    with pytest.raises(InvalidSetting, match=r"providers\.apple\.key") as caught:
        es256_key("providers.apple.key", text)
    assert text[:20] not in str(caught.value)


def test_a_service_account_is_read_and_shows_no_key() -> None:
    account = service_account("file", account_file("https://oauth.example/token"))
    assert (account.project_id, account.token_uri) == ("demo-project", "https://oauth.example/token")
    assert "PRIVATE" not in repr(account)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        json.dumps({"project_id": "p"}),
        json.dumps({"project_id": "p", "client_email": "e", "private_key": "tisn't"}),
    ],
)
def test_a_file_that_is_no_service_account_is_named_by_its_setting(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"providers\.google\.account") as caught:
        service_account("providers.google.account", text)
    assert "tisn't" not in str(caught.value)
