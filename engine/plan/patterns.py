"""Patterns of types: `order.shipped` is that type, `order.*` all that begin with the word, `*` every type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import check_type

ANY: Final = "*"


def patterns_of(type: str) -> Iterator[str]:
    """The patterns that match a type, the one that says most of it first: each costs its asker one look into a dict."""
    yield type
    while "." in type:
        type = type.rpartition(".")[0]
        yield f"{type}.*"
    yield ANY


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
