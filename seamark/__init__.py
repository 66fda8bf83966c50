"""Seamark for services and devices: `from seamark import Publisher, connect`.

The names are loaded when one is first used: the server imports `seamark.protocol` from here, and needs no client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamark.client import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    client = import_module("seamark.client")
    if name != "__all__" and name not in client.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(client, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *import_module("seamark.client").__all__])
