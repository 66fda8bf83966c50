"""Which languages will do where there is no text in somebody's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

EVERYBODY: Final = "default"
"""The locale of what is for all whose language has nothing of its own."""

T = TypeVar("T")


def fallbacks(locale: str) -> list[str]:
    """The locales to look for, the best first: `zh-Hant-TW`, `zh-Hant`, `zh`, `default`. So RFC 4647 (3.4) looks up languages."""
    found = []
    parts = [] if locale == EVERYBODY else locale.split("-")
    while parts:
        found.append("-".join(parts))
        parts.pop()
        if parts and len(parts[-1]) == 1:  # it only begins an extension, which is gone
            parts.pop()
    return [*found, EVERYBODY]


def best(texts: Mapping[str, T], locale: str) -> T | None:
    """What is there for this locale, or for the one that comes nearest."""
    return next((texts[one] for one in fallbacks(locale) if one in texts), None)
