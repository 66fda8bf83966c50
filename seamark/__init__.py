"""Seamark for services and devices: `from seamark import Publisher, connect`.

The names are loaded when they are first used, so that the `seamark` command starts without the SDK's dependencies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamark.client import (
        Bookmark,
        Connection,
        CursorStore,
        FileCursor,
        Live,
        MemoryCursor,
        Now,
        Problem,
        Published,
        Publisher,
        Record,
        Reset,
        Unread,
        connect,
    )

__all__ = [
    "Bookmark",
    "Connection",
    "CursorStore",
    "FileCursor",
    "Live",
    "MemoryCursor",
    "Now",
    "Problem",
    "Published",
    "Publisher",
    "Record",
    "Reset",
    "Unread",
    "connect",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("seamark.client"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
