"""Cuts texts so that what a provider limits still fits: between characters as people see them, never inside one.

Such a character (an extended grapheme cluster of UAX 29) may be a dozen code points: a flag, a family, a letter with its accents.
Half of one is another picture, or a box.
"""

from __future__ import annotations

from typing import Final

import msgspec
import regex

ELLIPSIS: Final = "…"

_GRAPHEME: Final = regex.compile(r"\X")


def json_bytes(text: str) -> int:
    """How many bytes a text takes inside a JSON string as `msgspec.json.encode` writes it."""
    return len(msgspec.json.encode(text)) - 2


def cut(text: str, size_max: int) -> str:
    """The text itself where it fits; else as many of its characters as fit together with an ellipsis; else nothing.

    Args:
        size_max: how many bytes of JSON the result may take.
    """
    if len(text) <= size_max and json_bytes(text) <= size_max:
        return text
    left = size_max - json_bytes(ELLIPSIS)
    end = 0
    # No more than `size_max` code points can fit. The last cluster of the slice may lack its end, and never fits.
    for found in _GRAPHEME.finditer(text[: max(size_max, 0)]):
        left -= json_bytes(found[0])
        if left < 0:
            break
        end = found.end()
    kept = text[:end].rstrip()
    return kept + ELLIPSIS if kept else ""
