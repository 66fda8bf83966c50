"""Patterns of types: `order.shipped` is that type, `order.*` all that begin with the word, `*` every type."""

from __future__ import annotations

import functools
from typing import Final

from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import check_type

ANY: Final = "*"


TYPES_KEPT: Final = 4096
"""Types whose patterns a process remembers, some 200 bytes each: a decision asks for those of its type eight times."""


@functools.lru_cache(TYPES_KEPT)
def patterns_of(type: str) -> tuple[str, ...]:
    """The patterns that match a type, the one that says most of it first: each costs its asker one look into a dict."""
    words = type.split(".")
    return (type, *(".".join(words[:count]) + ".*" for count in range(len(words) - 1, 0, -1)), ANY)


def check_pattern(pattern: str) -> str:
    """`pattern` itself.

    Raises:
        ValueError: it is none; the text says what one looks like.
    """
    try:
        if pattern != ANY:
            check_type(pattern.removesuffix(".*"))
    except InvalidToken as error:
        raise ValueError(
            f"{pattern[:80]!r} is no type and no pattern: write `order.shipped`, `order.*` or `*`"
        ) from error
    return pattern
