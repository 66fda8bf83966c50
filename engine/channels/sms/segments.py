"""How a text is cut into segments, which are what an SMS costs: 3GPP TS 23.038 (alphabets) and 23.040 (segments).

A segment has 140 bytes. A text of several segments gives up 6 of each for the header by which a phone joins them. One character
outside the GSM alphabet turns the whole text to UCS-2, where a segment holds less than half as much.
"""

from __future__ import annotations

import unicodedata
from typing import Final, Literal

import msgspec

Encoding = Literal["gsm-7", "ucs-2"]

BASIC: Final = (
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?"
    "¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
"""The GSM alphabet, in its order, without the escape at 0x1B."""

EXTENSION: Final = "\f^{}\\[~]|€"
"""These take two septets: the escape, and one more."""

SINGLE: Final[dict[Encoding, int]] = {"gsm-7": 160, "ucs-2": 70}
"""Units in a text of one segment: 140 bytes."""

MULTI: Final[dict[Encoding, int]] = {"gsm-7": 153, "ucs-2": 67}
"""Units in each segment of several: 134 bytes."""

SEGMENTS_MAX: Final = 255
"""The header counts segments in one byte."""

_SEPTETS: Final = dict.fromkeys(BASIC, 1) | dict.fromkeys(EXTENSION, 2)

_SMART: Final = str.maketrans(
    dict.fromkeys("«»“”„‟″‶❝❞〝〞ʺˮ＂", '"')
    | dict.fromkeys("‘’‚‛′‵❛❜ʹʻʼʽˈˊˋ´`＇", "'")
    | dict.fromkeys("‐‑‒–—―−﹘﹣－", "-")
    | dict.fromkeys("\t\u00a0\u1680\u202f\u205f\u3000", " ")
    | dict.fromkeys(map(chr, range(0x2000, 0x200B)), " ")
    | dict.fromkeys("\u00ad\u200b\u2060\ufeff", "")
    | {"…": "...", "‹": "<", "›": ">", "•": "-", "\u2028": "\n", "\u2029": "\n", "⁄": "/", "‼": "!!"}
)
"""What writing programs put in place of plain characters, and the plain ones. Letters stay as they are: they carry meaning."""


class Segmented(msgspec.Struct, frozen=True):
    """A text as it will be sent.

    Args:
        text: what is sent, after smart encoding.
        encoding: of all segments.
        units: septets of GSM-7 or 16-bit units of UCS-2, without headers.
        segments: what of the text is in each; together they are the text.
        reference: what the provider gives back with its reports.
    """

    text: str
    encoding: Encoding
    units: int
    segments: tuple[str, ...]
    reference: str = ""


def segmented(text: str, *, smart: bool = False) -> Segmented:
    """How `text` is cut into segments. An empty text has none.

    Args:
        text: any text.
        smart: typographic quotes, dashes and spaces become plain ones, where all of the text fits the GSM alphabet by that and
            takes no more segments; else nothing changes.
    """
    found = _segmented(text)
    if smart and found.encoding == "ucs-2":
        plain = _segmented(_plain(text))
        if plain.encoding == "gsm-7" and len(plain.segments) <= len(found.segments):
            return plain
    return found


def _segmented(text: str) -> Segmented:
    encoding: Encoding = "gsm-7" if _is_gsm(text) else "ucs-2"
    units = sum(_units(character, encoding) for character in text)
    if units <= SINGLE[encoding]:
        return Segmented(text, encoding, units, (text,) if text else ())
    return Segmented(text, encoding, units, _cut(text, encoding))


def _is_gsm(text: str) -> bool:
    return all(character in _SEPTETS for character in text)


def _plain(text: str) -> str:
    # Composed first: of `e` and an accent that follows it, the alphabet knows only the letter with both.
    return unicodedata.normalize("NFC", text).translate(_SMART)


def _units(character: str, encoding: Encoding) -> int:
    if encoding == "gsm-7":
        return _SEPTETS[character]
    return 2 if character > "\uffff" else 1  # a surrogate pair


def _cut(text: str, encoding: Encoding) -> tuple[str, ...]:
    """Fill each segment as far as whole characters fit: half an escape or surrogate pair would be shown as something else."""
    segments: list[str] = []
    begin, used = 0, 0
    for index, character in enumerate(text):
        units = _units(character, encoding)
        if used + units > MULTI[encoding]:
            segments.append(text[begin:index])
            begin, used = index, 0
        used += units
    return (*segments, text[begin:])
