"""How commands print: JSON lines for machines, a few coloured words for people."""

from __future__ import annotations

from typing import Any

import msgspec
import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on one line, unbuffered: it may be read by a pipe that waits for it."""
    typer.echo(msgspec.json.encode(value))
