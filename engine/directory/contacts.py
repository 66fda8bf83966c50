"""How people are reached, and where they live: e-mail addresses, phone numbers, locales, time zones. One form for each.

A message says what is wrong and how to write it. It never repeats what was given, which may be somebody's address.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, Literal

import idna

from engine.plan.hours import is_zone

Addressed = Literal["email", "sms"]
"""Channels with addresses that people have elsewhere, too. Tokens and endpoints are retired where they are kept."""

EMAIL_BYTES_MAX: Final = 254
"""RFC 5321 leaves so many for an address in a path of 256."""

LOCAL_PART_BYTES_MAX: Final = 64
LOCALE_CHARS_MAX: Final = 35
"""What RFC 5646 (4.4.1) asks everybody to have room for."""

TIMEZONE_CHARS_MAX: Final = 64

_NO_ZONES: Final = frozenset({"localtime", "posixrules", "Factory"})
"""Files beside the zones, which mean something else on every machine."""

_LOCAL_PART: Final = re.compile(r"[^\s@\x00-\x1f\x7f\"(),:;<>\[\]\\\ud800-\udfff]+")
_LABEL: Final = re.compile(r"(?!-)[a-z0-9\u0080-\ud7ff\ue000-\U0010ffff-]{1,63}(?<!-)")
_PHONE: Final = re.compile(r"\+[1-9][0-9]{6,14}", re.ASCII)

_LOCALE: Final = re.compile(
    r"(?P<language>[a-z]{2,3}(?:-[a-z]{3}){0,3}|[a-z]{4,8})(?:-(?P<script>[a-z]{4}))?(?:-(?P<region>[a-z]{2}|[0-9]{3}))?"
    r"(?P<rest>(?:-(?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*(?:-[a-wyz0-9](?:-[a-z0-9]{2,8})+)*(?:-x(?:-[a-z0-9]{1,8})+)?)",
    re.ASCII | re.IGNORECASE,
)
"""`langtag` of RFC 5646, without the grandfathered tags."""


def checked_email(text: str) -> str:
    """An e-mail address, its domain in lower case.

    Raises:
        ValueError: it is none.
    """
    local, at, domain = text.strip().rpartition("@")
    domain = domain.lower()
    labels = domain.split(".")
    if (
        not at
        or _LOCAL_PART.fullmatch(local) is None
        or len(local.encode()) > LOCAL_PART_BYTES_MAX
        or len(labels) < 2
        or not all(_LABEL.fullmatch(label) for label in labels)
        or any(one.isspace() for one in domain)
        or len(f"{local}@{domain}".encode()) > EMAIL_BYTES_MAX
    ):
        raise ValueError(
            f"`email` is no e-mail address of at most {EMAIL_BYTES_MAX} bytes: write it as alice@example.com"
        )
    return f"{local}@{domain}"


def checked_phone(text: str) -> str:
    """A phone number in the form of E.164.

    Raises:
        ValueError: it is none.
    """
    if _PHONE.fullmatch(text) is None:
        raise ValueError(
            "`phone` is no number in the form of E.164: write + and the country's code, then digits only, as +4366412345678"
        )
    return text


def checked_locale(text: str) -> str:
    """A language tag of BCP 47, in its usual letters: `de-at` becomes `de-AT`.

    Raises:
        ValueError: it is none.
    """
    found = _LOCALE.fullmatch(text) if len(text) <= LOCALE_CHARS_MAX else None
    if found is None:
        raise ValueError("`locale` is no language tag of BCP 47: write it as de, de-AT or zh-Hant-TW, with a hyphen")
    parts = (
        found["language"].lower(),
        (found["script"] or "").title(),
        (found["region"] or "").upper(),
        (found["rest"] or "").lower().removeprefix("-"),
    )
    return "-".join(part for part in parts if part)


def checked_timezone(text: str) -> str:
    """A time zone of the IANA database.

    Raises:
        ValueError: there is none of this name.
    """
    if len(text) > TIMEZONE_CHARS_MAX or text in _NO_ZONES or not is_zone(text):
        raise ValueError(
            "`timezone` is not in the IANA database: write it as Europe/Vienna or UTC, capital letters included"
        )
    return text


def ascii_domain(domain: str) -> str:
    """A domain in the letters that DNS and servers know (IDNA 2008): `xn--mnchen-3ya.de` for `München.de`.

    Raises:
        ValueError: there is no such domain.
    """
    return domain.lower() if domain.isascii() else idna.encode(domain, uts46=True).decode()


def normalized(channel: Addressed, address: str) -> str:
    """The one form in which addresses are compared.

    Spaces around it and capital letters of an e-mail address make no other, nor does the alphabet that its domain is written in:
    mails go to the domain in ASCII, and what is reported of them names that.
    """
    text = address.strip()
    return _normalized_email(text.lower()) if channel == "email" else text


def _normalized_email(text: str) -> str:
    local, at, domain = text.rpartition("@")
    if not at or domain.isascii() or len(domain) > EMAIL_BYTES_MAX:
        return text
    try:
        return f"{local}@{ascii_domain(domain)}"
    except ValueError:
        return text  # no mail can go there


def address_hash(channel: Addressed, address: str) -> bytes:
    """What an address is looked for by. Who changes its form needs a migration: hashes are stored."""
    return hashlib.sha256(f"{channel}\n{normalized(channel, address)}".encode("utf-8", "surrogatepass")).digest()
