"""A mail has the headers that were meant, and no others, whatever stands in subjects, names and addresses."""

from __future__ import annotations

from datetime import UTC, datetime
from email import message_from_bytes, policy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.email.message import (
    SUBJECT_CHARS_MAX,
    BadAddress,
    Mail,
    ascii_address,
    headers_of,
    list_id,
    message_id,
    named,
    one_line,
    to_bytes,
    unstructured,
)
from engine.channels.email.unsubscribe import TokenRefused, Tokens, Unsubscription

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
WHAT = Unsubscription(tenant="t", user="alice@example.com", channel="email", category="news")
NAMES = ["Date", "From", "To", "Subject", "Message-ID", "Auto-Submitted", "List-Id", "List-Unsubscribe", "List-Unsubscribe-Post",
         "MIME-Version", "Content-Type"]  # fmt: skip


def mail(**fields: Any) -> Mail:
    made = {
        "message_id": message_id("t/order-17/alice/email/", "example.org"),
        "date": NOW,
        "sender": "news@example.org",
        "sender_name": "Example",
        "envelope_from": "bounces@example.org",
        "reply_to": "",
        "subject": "Shipped",
        "text": "On its way\n",
        "html": "<p>On its way</p>",
        "list_id": list_id("t", "orders", "example.org"),
        "unsubscribe_url": "https://seamark.example/u/abc",
    }
    return Mail(**(made | fields))


def read(raw: bytes) -> Any:
    """As a mail program does."""
    return message_from_bytes(raw, policy=policy.default)


INJECTIONS = [
    "x\r\nBcc: evil@example.net", "x\nBcc: evil@example.net", "x\rBcc: evil@example.net", "x\r\n\r\n<p>body",
    "x\x00\x0bBcc: evil@example.net",
    "x\u2028Bcc: evil@example.net", "x\u2029Bcc: evil@example.net", "x\u0085Bcc: evil@example.net",
    "=?utf-8?q?=0D=0ABcc:_evil@example.net?=",
    "=?utf-8?b?DQpCY2M6IGV2aWxAZXhhbXBsZS5uZXQ=?=", "=?utf-8?q?a?=\r\n =?utf-8?q?=0D=0ABcc:_evil?=", "=?ascii?q?=0ABcc:_e?= x",
    "\r\n .\r\nQUIT\r\n",
    "x\r\n Bcc: evil@example.net", '"\r\nBcc: evil', "\\", '"', "a, b@example.net", "<evil@example.net>", "x" * 5000,
    "ü" * 5000, "🙂" * 200,
    "\ud800x", "\u202egnp.exe", " ", "=?", "?=", "=?=?utf-8?q?=0D?=?=",
]  # fmt: skip


def assert_whole(raw: bytes, recipient: str = "alice@example.com") -> Any:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.isascii()
    assert all(len(line) <= 998 for line in raw.split(b"\r\n"))
    assert b"\n" not in raw.replace(b"\r\n", b"")
    assert b"\r" not in raw.replace(b"\r\n", b"")
    message = read(raw)
    assert sorted(message.keys()) == sorted({*NAMES, *(["Reply-To"] if message["Reply-To"] else [])})
    assert [one.addr_spec for one in message["To"].addresses] == [recipient]
    assert [one.addr_spec for one in message["From"].addresses] == ["news@example.org"]
    assert body.count(b"--" + message.get_boundary().encode()) == 3
    return message


@pytest.mark.parametrize("text", INJECTIONS)
def test_nothing_in_a_subject_or_a_name_becomes_a_header_or_a_recipient(text: str) -> None:
    message = assert_whole(to_bytes(mail(subject=text, sender_name=text, text=text, html=text), "alice@example.com"))
    assert message["Bcc"] is None


@given(subject=st.text(max_size=400), name=st.text(max_size=200), body=st.text(max_size=300))
def test_nor_does_any_other_text(subject: str, name: str, body: str) -> None:
    message = assert_whole(to_bytes(mail(subject=subject, sender_name=name, text=body), "alice@example.com"))
    text = message.get_body(("plain",)).get_content()
    expected = body.replace("\r\n", "\n").replace("\r", "\n")
    assert text.replace("\r\n", "\n").rstrip("\n") == expected.rstrip("\n")


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=200))
def test_a_subject_reads_as_it_was_written(subject: str) -> None:
    raw = to_bytes(mail(subject=subject), "alice@example.com")
    assert str(read(raw)["Subject"]).replace(" ", "") == one_line(subject).replace(" ", "")


@given(st.text(max_size=2000))
def test_a_line_is_one_line_of_what_can_be_seen(text: str) -> None:
    line = one_line(text)
    assert len(line) <= SUBJECT_CHARS_MAX
    assert line.splitlines() in ([], [line])
    assert unstructured(line).isascii()


@pytest.mark.parametrize("address", [
    "", "x", "@example.com", "a@", "a b@example.com", "a@b c", "a@example.com\r\nRCPT TO:<b@example.com>", "a@example.com\n",
    "<a@example.com>",
    "a@example.com, b@example.com", "a@exa_mple.com", "a..b@example.com", ".a@example.com", "a.@example.com", "a@example..com",
    "ü@example.com",
    "a@" + "b" * 300 + ".com", "a" * 65 + "@example.com", '"a b"@example.com', "a@[127.0.0.1]", "a@\u2028example.com",
    "a@example.com\x00", "a@-", "a@-b.example", "a@b.example-", "a@localhost", "a@b.example.", "a@.b.example",
])  # fmt: skip
def test_what_is_no_address_gets_no_mail_and_is_not_repeated(address: str) -> None:
    with pytest.raises(BadAddress) as refused:
        ascii_address(address)
    assert len(address) < 3 or address not in str(refused.value)


@pytest.mark.parametrize(("address", "written"), [
    ("alice@example.com", "alice@example.com"),
    ("a+b'c@example.com", "a+b'c@example.com"),
    ("alice@bücher.example", "alice@xn--bcher-kva.example"),
])  # fmt: skip
def test_a_domain_is_written_in_ascii(address: str, written: str) -> None:
    assert ascii_address(address) == written


@pytest.mark.parametrize("member", ["sender", "reply_to", "message_id", "list_id", "unsubscribe_url"])
@pytest.mark.parametrize(
    "text",
    ["a@example.com\r\nBcc: b@example.com", "ü", "https://x.example/>\r\nX: y", "https://x.example/" + "a" * 2000],
)
def test_what_only_the_configuration_can_get_wrong_is_refused(member: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"header|link"):
        to_bytes(mail(**{member: text}), "alice@example.com")


def test_the_same_mail_is_the_same_to_the_last_byte() -> None:
    assert to_bytes(mail(), "alice@example.com") == to_bytes(mail(), "alice@example.com")


def test_a_message_id_is_of_its_job_and_tells_nothing_of_it() -> None:
    first, second = (message_id(f"t/{id}/alice@example.com/email/", "example.org") for id in ("a", "b"))
    assert first != second
    assert "alice" not in first
    assert first.endswith("@example.org")


def test_one_click_is_announced_as_rfc_8058_says() -> None:
    headers = headers_of(mail())
    assert headers["List-Unsubscribe"] == "<https://seamark.example/u/abc>"
    assert headers["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert headers["List-Id"] == "<orders.t.example.org>"


def test_without_tls_a_link_is_no_one_click_link() -> None:
    headers = headers_of(mail(unsubscribe_url="http://127.0.0.1:8080/u/abc"))
    assert "List-Unsubscribe" in headers
    assert "List-Unsubscribe-Post" not in headers


def test_what_cannot_be_unsubscribed_says_nothing_of_it() -> None:
    assert headers_of(mail(unsubscribe_url="", list_id="")).keys() == {"Message-ID", "Auto-Submitted"}


@given(tenant=st.text(max_size=60), category=st.text(max_size=60))
def test_a_list_is_named_by_a_domain_name_whatever_its_category_is_called(tenant: str, category: str) -> None:
    name = list_id(tenant, category, "example.org")
    labels = name.split(".")
    assert all(0 < len(label) <= 63 and label.isascii() for label in labels)
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-.")


@pytest.mark.parametrize(("name", "written"), [
    ("", "a@b.example"), ("Alice", "Alice <a@b.example>"), ("Alice, Inc.", '"Alice, Inc." <a@b.example>'),
    ('A "B" \\', '"A \\"B\\" \\\\" <a@b.example>'),
    ("Älice", "=?utf-8?b?w4RsaWNl?= <a@b.example>"),
])  # fmt: skip
def test_a_name_stands_beside_its_address(name: str, written: str) -> None:
    assert named(name, "a@b.example") == written


SECRETS = ["a" * 32, "b" * 40]


@given(tenant=st.text(min_size=1, max_size=40), user=st.text(min_size=1, max_size=128), category=st.text(max_size=60))
def test_a_token_means_what_it_was_made_for_and_shows_nothing_of_it(tenant: str, user: str, category: str) -> None:
    what = Unsubscription(tenant=tenant, user=user, channel="email", category=category)
    token = Tokens(SECRETS).make(what)
    assert Tokens(SECRETS).read(token) == what
    assert Tokens(SECRETS).make(what) == token, "each mail about the same thing has the same link"


def test_it_shows_nothing_of_the_user() -> None:
    import base64

    token = Tokens(SECRETS).make(WHAT)
    assert b"alice" not in base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def test_an_old_secret_still_reads_and_a_forgotten_one_does_not() -> None:
    token = Tokens(SECRETS[1:]).make(WHAT)
    assert Tokens(SECRETS).read(token) == WHAT
    with pytest.raises(TokenRefused):
        Tokens(SECRETS[:1]).read(token)


@given(st.data())
def test_a_token_that_was_changed_anywhere_is_none(data: st.DataObject) -> None:
    token = Tokens(SECRETS).make(WHAT)
    place = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.sampled_from("ABCDEFabcdef0123456789_-=. /é"))
    changed = token[:place] + letter + token[place + 1 :]
    if changed != token:
        with pytest.raises(TokenRefused):
            Tokens(SECRETS).read(changed)


@given(st.one_of(st.text(max_size=100), st.from_regex(r"[A-Za-z0-9_-]{0,200}", fullmatch=True)))
def test_what_nobody_has_made_is_refused_and_breaks_nothing(token: str) -> None:
    with pytest.raises(TokenRefused):
        Tokens(SECRETS).read(token)


@pytest.mark.parametrize(
    "change",
    [lambda token: token + "A", lambda token: token[:-1], lambda token: token + "=", lambda token: token.swapcase()],
)
def test_a_token_has_one_spelling(change) -> None:
    with pytest.raises(TokenRefused):
        Tokens(SECRETS).read(change(Tokens(SECRETS).make(WHAT)))


def test_a_short_secret_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="openssl"):
        Tokens(["short"])
    with pytest.raises(ValueError, match="32 characters"):
        Tokens([])


def test_a_link_that_no_line_has_room_for_is_not_made() -> None:
    with pytest.raises(ValueError, match="too long"):
        Tokens(SECRETS).make(Unsubscription(tenant="t", user="ü" * 128, channel="email", category="🙂" * 128))
