"""An e-mail as bytes. Nothing that comes from a template or a value can become a header of its own, or a second recipient.

Headers are written here, character by character, and not by the `email` package's parsers of values: these decode what looks
like an encoded word, and some versions of Python write out the line end that was hidden in it (CVE-2024-6923, CVE-2026-1299).
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import datetime
from email.parser import BytesHeaderParser
from email.utils import format_datetime
from typing import Final

import msgspec

from engine.directory.contacts import ascii_domain

SUBJECT_CHARS_MAX: Final = 300
"""Programs show a hundred."""

NAME_CHARS_MAX: Final = 100

_UNSEEN: Final = re.compile(
    r"[\x00-\x20\x7f-\xa0\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ud800-\udfff\ufff0-\uffff]+"
)
"""Controls, line ends of all kinds, and characters that show nothing or turn the direction of what follows."""

_PLAIN: Final = re.compile(r"[\x20-\x7e]*")
_ATOMS: Final = re.compile(r"[A-Za-z0-9 !#$%&'*+/=?^_`{|}~-]*")
_ADDRESS: Final = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@"
    r"(?=.{1,253}$)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9-]{1,63}(?<!-)"
)
_LABEL: Final = re.compile(r"[^a-z0-9]+")
_URL: Final = re.compile(r"https?://[\x21-\x3b\x3d\x3f-\x7e]+")
_MESSAGE_ID: Final = re.compile(r"[a-z0-9]{1,64}@[a-z0-9.-]{1,253}")
_LIST_ID: Final = re.compile(r"[a-z0-9.-]{1,400}")

URL_CHARS_MAX: Final = 900
"""A line may have 998 characters (RFC 5322), and an address has no blank to break it at."""

_WORD_BYTES: Final = 42
"""An encoded word may have 75 characters (RFC 2047): `=?utf-8?b?`, so many bytes in base64, `?=`."""


class BadAddress(ValueError):
    """It is no address that mail can be sent to in ASCII. The message does not repeat it."""


class Mail(msgspec.Struct, frozen=True, kw_only=True):
    """A mail before it has a recipient.

    Args:
        message_id: without its angle brackets; the same for each attempt.
        sender, sender_name, reply_to: of the headers; `envelope_from` is where bounces go.
        list_id: which kind of message this is, as a domain name; "": it belongs to no list.
        unsubscribe_url: "": it cannot be unsubscribed from.
        reference: what a service gets beside it, and gives back with its reports; a relay gets none.
    """

    message_id: str
    date: datetime
    sender: str
    sender_name: str
    envelope_from: str
    reply_to: str
    subject: str
    text: str
    html: str
    list_id: str
    unsubscribe_url: str
    reference: str = ""


def one_line(text: str, chars_max: int = SUBJECT_CHARS_MAX) -> str:
    """A text as a header may show it: in one line, of what can be seen."""
    text = _UNSEEN.sub(" ", text[: chars_max * 4]).strip()
    return text if len(text) <= chars_max else text[: chars_max - 1].rstrip() + "…"


def ascii_address(address: str) -> str:
    """An address as SMTP takes it without extensions: its domain in ASCII (IDNA 2008).

    Raises:
        BadAddress: it is none, or has other letters before its @ (RFC 6531, which no relay can be trusted to know).
    """
    local, _, domain = address.rpartition("@")
    if not domain.isascii():
        domain = _ascii_domain(domain)
    written = f"{local}@{domain}"
    if _ADDRESS.fullmatch(written) is None or ".." in local or local.startswith(".") or local.endswith("."):
        raise BadAddress("no address")
    return written


def domain_of(address: str) -> str:
    """The domain whose servers take mails for an address, in small letters and ASCII. Of what is no address: some text."""
    domain = address.rpartition("@")[2]
    try:
        return (domain if domain.isascii() else _ascii_domain(domain)).lower()
    except BadAddress:
        return domain


def _ascii_domain(domain: str) -> str:
    try:
        return ascii_domain(domain)
    except ValueError as error:
        raise BadAddress("its domain is none") from error


def message_id(key: str, domain: str) -> str:
    """The Message-ID of a job: the same whenever and by whomever it is sent, so that a repetition shows as one."""
    return f"{hashlib.sha256(key.encode()).hexdigest()[:40]}@{domain}"


def list_id(tenant: str, category: str, domain: str) -> str:
    """Names a kind of message (RFC 2919), for filters of people and complaints of providers."""
    labels = [_LABEL.sub("-", one.lower()).strip("-")[:60] or "x" for one in (category or "notifications", tenant)]
    return ".".join([*labels, domain])


def headers_of(mail: Mail) -> dict[str, str]:
    """Headers beside those that every provider has a field for. Values are ASCII, safe as they are.

    One click must suffice (RFC 8058), so `List-Unsubscribe` is one https URI, and both headers are there or none; a link without
    TLS, which only `seamark dev` has, is announced without the second.
    """
    headers = {"Message-ID": f"<{_checked(_MESSAGE_ID, mail.message_id)}>", "Auto-Submitted": "auto-generated"}
    if mail.list_id:
        headers["List-Id"] = f"<{_checked(_LIST_ID, mail.list_id)}>"
    if mail.unsubscribe_url:
        if len(mail.unsubscribe_url) > URL_CHARS_MAX:
            raise ValueError(f"an unsubscribe link may have {URL_CHARS_MAX} characters")
        headers["List-Unsubscribe"] = f"<{_checked(_URL, mail.unsubscribe_url)}>"
        if mail.unsubscribe_url.startswith("https://"):
            headers["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    return headers


def named(name: str, address: str) -> str:
    """A mailbox as a header has it: `"Alice, Inc." <alice@example.com>`."""
    name = one_line(name, NAME_CHARS_MAX)
    if not name:
        return address
    if _ATOMS.fullmatch(name) and "=?" not in name:
        return f"{name} <{address}>"
    if _PLAIN.fullmatch(name) and "=?" not in name:
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}" <{address}>'
    return f"{_encoded(name)} <{address}>"


def to_bytes(mail: Mail, recipient: str) -> bytes:
    """The message, its lines ended by CRLF and none longer than SMTP allows (998).

    Args:
        recipient: as `ascii_address` gives it.

    Raises:
        ValueError: a part that only the configuration can have got wrong is no address, id or URL.
    """
    boundary = hashlib.sha256(f"{mail.message_id} {mail.text} {mail.html}".encode("utf-8", "replace")).hexdigest()[:40]
    headers = {
        "Date": format_datetime(mail.date),
        "From": named(mail.sender_name, _checked(_ADDRESS, mail.sender)),
        "To": _checked(_ADDRESS, recipient),
        "Subject": unstructured(one_line(mail.subject)),
        **headers_of(mail),
        "MIME-Version": "1.0",
        "Content-Type": f'multipart/alternative; boundary="{boundary}"',
    }
    if mail.reply_to:
        headers["Reply-To"] = _checked(_ADDRESS, mail.reply_to)
    head = "".join(f"{name}: {_folded(name, value)}\r\n" for name, value in headers.items()).encode("ascii")
    _check_head(head, headers)
    parts = "".join(
        f"--{boundary}\r\nContent-Type: text/{kind}; charset=utf-8\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        f"{_base64(content)}\r\n"
        for kind, content in (("plain", mail.text), ("html", mail.html))
    )
    return head + b"\r\n" + f"{parts}--{boundary}--\r\n".encode("ascii")


def unstructured(text: str) -> str:
    """A text as the value of a header. What is not plain ASCII, or looks encoded already, becomes encoded words (RFC 2047)."""
    return text if _PLAIN.fullmatch(text) and "=?" not in text else _encoded(text)


def _encoded(text: str) -> str:
    words, begin = [], 0
    raw = text.encode("utf-8", "replace")
    while begin < len(raw):
        end = min(begin + _WORD_BYTES, len(raw))
        while end < len(raw) and raw[end] & 0xC0 == 0x80:  # a word ends between characters
            end -= 1
        words.append(f"=?utf-8?b?{base64.b64encode(raw[begin:end]).decode()}?=")
        begin = end
    return " ".join(words)


def _folded(name: str, value: str) -> str:
    """A value in lines of at most 78 characters where it has blanks to break at, as readers put them together again."""
    lines: list[str] = []
    line = ""
    for word in value.split(" "):
        room = 76 - (0 if lines else len(name) + 2)
        if line and len(line) + 1 + len(word) > room:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\r\n ".join([*lines, line])


def _base64(text: str) -> str:
    raw = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n").encode("utf-8", "replace")
    return base64.encodebytes(raw).decode().replace("\n", "\r\n")


def _checked(form: re.Pattern[str], value: str) -> str:
    if form.fullmatch(value) is None:
        raise ValueError("a header's address, id or URL is none")
    return value


def _check_head(head: bytes, intended: dict[str, str]) -> None:
    """What others will read are exactly the headers that were meant: whatever slipped through above ends here."""
    read = BytesHeaderParser().parsebytes(head + b"\r\n")
    if read.keys() != list(intended):
        raise ValueError("a header of a message would have become another")
