"""Headers of dead letters: what comes from outside stays on its line."""

from __future__ import annotations

from typing import Final

DETAIL_CHARS_MAX: Final = 512

_CONTROLS: Final = dict.fromkeys((*range(32), 127), " ")


def header_text(text: str) -> str:
    """`text` as one line of printable ASCII: it came from outside and must not smuggle a header."""
    return text.encode("ascii", "backslashreplace").decode().translate(_CONTROLS)[:DETAIL_CHARS_MAX]
