"""Webhooks are signed as Standard Webhooks says, by every secret that is good."""

import base64
import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st

from engine.channels.webhook.channel import Endpoint
from engine.channels.webhook.signature import message_id, signature, signed_headers
from engine.directory.webhooks import check_secret, make_secret

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_a_signature_is_that_of_the_reference_implementations() -> None:
    made = signature(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@given(body=st.binary(max_size=200), timestamp=st.integers(0, 1 << 40), key=st.text(max_size=40))
def test_a_receiver_that_knows_either_secret_finds_its_signature(body: bytes, timestamp: int, key: str) -> None:
    secrets = [make_secret(), make_secret()]
    headers = signed_headers(secrets, message_id(key), timestamp, body)
    signatures = headers["webhook-signature"].split(" ")
    assert len(signatures) == 2
    for secret, made in zip(secrets, signatures, strict=True):
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        right = hmac.new(base64.b64decode(check_secret(secret)[6:]), signed, hashlib.sha256).digest()
        assert made == "v1," + base64.b64encode(right).decode()


@given(st.text(max_size=60), st.text(max_size=60))
def test_an_id_is_the_same_for_a_job_and_a_header_whatever_the_user_is_called(one: str, other: str) -> None:
    assert (message_id(one) == message_id(other)) == (one == other)
    assert message_id(one).isascii()
    assert message_id(one).replace("-", "").replace("_", "").isalnum()


def test_an_endpoint_shows_neither_its_address_nor_its_secrets() -> None:
    shown = f"{Endpoint('wh_1', 'https://hooks.example.com/key/abc', (SECRET,))!r}"
    assert shown == "Endpoint(id='wh_1')"
