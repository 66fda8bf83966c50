"""Requests to Amazon are signed as its own test suite says, and messages of SNS are believed only when they are genuine."""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.aws import Credentials, certificate_url, is_signed_by_sns, signed_headers

CREDENTIALS = Credentials(key_id="AKIDEXAMPLE", secret="wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
AT = datetime(2015, 8, 30, 12, 36, tzinfo=UTC)
NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
TOPIC = "arn:aws:sns:eu-central-1:123456789012:sms"


@pytest.mark.parametrize(
    ("method", "headers", "body", "signature"),
    [
        ("GET", {}, b"", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("POST", {"Content-Type": "application/x-www-form-urlencoded"}, b"Param1=value1",
         "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
    ],
    ids=["get-vanilla", "post-x-www-form-urlencoded"],
)  # fmt: skip
def test_requests_are_signed_as_in_amazons_test_suite(method, headers, body, signature) -> None:
    made = signed_headers(
        CREDENTIALS, url="https://example.amazonaws.com/", headers=headers, body=body, region="us-east-1", service="service",
        now=AT, method=method,
    )  # fmt: skip
    assert made["Authorization"].endswith(f"Signature={signature}")
    assert made["X-Amz-Date"] == "20150830T123600Z"


def test_a_secret_is_not_shown() -> None:
    assert "EXAMPLEKEY" not in repr(CREDENTIALS)


@pytest.fixture(scope="module")
def signer():
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    dated = made.not_valid_before(NOW - timedelta(days=9)).not_valid_after(NOW + timedelta(days=9))
    return key, dated.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def signed(key: rsa.RSAPrivateKey, version: str = "2", **members: str) -> dict[str, str]:
    message = {
        "Type": "Notification", "MessageId": "m1", "TopicArn": TOPIC, "Message": "{}\nline", "SignatureVersion": version,
        "Timestamp": NOW.isoformat(timespec="milliseconds").replace("+00:00", "Z"), **members,
    }  # fmt: skip
    names = ["Message", "MessageId", *(["Subject"] if "Subject" in message else []), "Timestamp", "TopicArn", "Type"]
    text = "".join(f"{name}\n{message[name]}\n" for name in names).encode()
    digest = hashes.SHA1() if version == "1" else hashes.SHA256()
    return message | {"Signature": base64.b64encode(key.sign(text, padding.PKCS1v15(), digest)).decode()}


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("members", [{}, {"Subject": "STOP"}])
def test_a_genuine_message_is_believed(signer, version: str, members: dict[str, str]) -> None:
    key, certificate = signer
    assert is_signed_by_sns(signed(key, version, **members), certificate, topic=TOPIC, now=NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"Message": "{}"}, {"MessageId": "m2"}, {"Subject": "added"}, {"Type": "SubscriptionConfirmation"}, {"Type": None},
        {"TopicArn": TOPIC + "x"}, {"Signature": "AAAA"}, {"Signature": None}, {"Signature": "%"}, {"SignatureVersion": "1"},
        {"SignatureVersion": "3"}, {"Timestamp": "yesterday"}, {"Timestamp": "2026-11-29T12:00:00"}, {"Type": ["Notification"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_message_that_was_changed_is_not(signer, change) -> None:
    key, certificate = signer
    assert not is_signed_by_sns(signed(key) | change, certificate, topic=TOPIC, now=NOW)


def test_nor_is_one_that_is_old_of_another_topic_or_of_another_key(signer) -> None:
    key, certificate = signer
    message = signed(key)
    assert not is_signed_by_sns(message, certificate, topic=TOPIC, now=NOW + timedelta(hours=1, seconds=1))
    assert not is_signed_by_sns(message, certificate, topic="arn:aws:sns:eu-central-1:1:other", now=NOW)
    assert not is_signed_by_sns(message, b"no certificate", topic=TOPIC, now=NOW)
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert not is_signed_by_sns(signed(other), certificate, topic=TOPIC, now=NOW)
    late = NOW + timedelta(days=10)
    fresh = signed(key, Timestamp=late.isoformat())
    assert not is_signed_by_sns(fresh, certificate, topic=TOPIC, now=late), "the certificate has run out"


@given(
    st.dictionaries(
        st.sampled_from(["Type", "Message", "MessageId", "Timestamp", "TopicArn", "Signature", "SignatureVersion", "SigningCertURL"]),
        st.sampled_from([TOPIC, "Notification", "1", "2", NOW.isoformat(), "", None, 7, [], {}]) | st.text(max_size=9),
    )
)
def test_no_message_is_too_odd_to_be_refused(message) -> None:
    assert not is_signed_by_sns(message, b"", topic=TOPIC, now=NOW)
    assert certificate_url(message) is None


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://sns.eu-central-1.amazonaws.com/SimpleNotificationService-0123.pem", True),
        ("https://sns.cn-north-1.amazonaws.com.cn/SimpleNotificationService-0123.pem", True),
        ("http://sns.eu-central-1.amazonaws.com/a.pem", False),
        ("https://sns.eu-central-1.amazonaws.com.evil.net/a.pem", False),
        ("https://sns.eu-central-1.amazonaws.com@evil.net/a.pem", False),
        ("https://evil.net/sns.eu-central-1.amazonaws.com/a.pem", False),
        ("https://sns.eu-central-1.amazonaws.com:8443/a.pem", False),
        ("https://sns.eu-central-1.amazonaws.com/a.pem?x", False),
        ("https://s3.amazonaws.com/a.pem", False),
        ("https://[/a.pem", False),
        (None, False),
        (7, False),
    ],
)
def test_certificates_come_from_amazon_only(url, good: bool) -> None:
    assert certificate_url({"SigningCertURL": url}) == (url if good else None)
