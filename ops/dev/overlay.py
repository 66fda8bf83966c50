"""The settings of an embedded server that differ from the shipped configuration, each with its value and its reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_INCLUDE = re.compile(r'^\s*include\s+"([^"]+)"\s*$')
_NAME = re.compile(r"\s*([\w-]+)\b")
_NOT_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|#.*|//.*')
"""Strings and comments: brackets in them open and close nothing."""


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs from the shipped one.

    Attributes:
        key: the setting. In a nats-server file, its blocks come before it, with dots (`jetstream.sync_interval`), and a
            list with `[]` (`accounts.SEAMARK.users[]`) gets `value` as its first element.
        value: as the server's own configuration writes it.
        reason: why this server must have it so.
    """

    key: str
    value: str
    reason: str


Overlay = tuple[Change, ...]


def overlaid_settings(shipped: Mapping[str, str], overlay: Iterable[Change]) -> dict[str, str]:
    """The shipped settings with the changes of an overlay."""
    return {**shipped, **{change.key: change.value for change in overlay}}


def with_includes(path: Path) -> str:
    """The text of a nats-server file, with the text of each included file in its place, as the server reads them."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = _INCLUDE.match(line)
        lines.append(with_includes(path.parent / found[1]) if found else line + "\n")
    return "".join(lines)


def overlaid_file(text: str, overlay: Iterable[Change]) -> str:
    """The text of a nats-server file with the changes of an overlay.

    A value that the file sets is replaced wherever it is set. A value that it does not set is added to its block.

    Raises:
        ValueError: the file has no such block or list, or is written in a way this module does not read.
    """
    lines = text.splitlines()
    for change in overlay:
        lines = _changed(lines, change)
    return "\n".join(lines) + "\n"


def _changed(lines: list[str], change: Change) -> list[str]:
    *block, name = change.key.split(".")
    if name.endswith("[]"):
        return _added_behind(lines, change.key.removesuffix("[]"), change, change.value)
    entry = f"{name}: {change.value}"
    places = {number for number, (path, opens) in enumerate(_paths(lines)) if path == change.key and not opens}
    if places:
        return [
            part for n, line in enumerate(lines) for part in (_noted(line, change, entry) if n in places else [line])
        ]
    return _added_behind(lines, ".".join(block), change, entry) if block else [*lines, *_noted("", change, entry)]


def _added_behind(lines: list[str], block: str, change: Change, entry: str) -> list[str]:
    for number, (path, opens) in enumerate(_paths(lines)):
        if path == block and opens:
            return [*lines[: number + 1], *_noted(lines[number + 1], change, entry), *lines[number + 1 :]]
    raise ValueError(f"the shipped configuration has no block {block!r} that begins on a line of its own")


def _noted(beside: str, change: Change, entry: str) -> list[str]:
    """The entry below its reason, indented as the line `beside`."""
    indent = beside[: len(beside) - len(beside.lstrip())]
    return [f"{indent}# otherwise than shipped: {change.reason}", f"{indent}{entry}"]


def _paths(lines: list[str]) -> Iterable[tuple[str, bool]]:
    """For each line the setting or block it names (with the blocks around it), and whether it opens that block."""
    stack: list[str] = []
    for line in lines:
        bare = _NOT_STRUCTURE.sub("", line)
        depth = sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))
        if abs(depth) > 1:
            raise ValueError(f"one line opens or closes several blocks: {line.strip()}")
        found = _NAME.match(bare)
        path = ".".join([*stack, found[1]]) if found else ""
        yield path, depth > 0
        if depth > 0:
            stack.append(found[1] if found else "")
        elif depth < 0:
            if not stack:
                raise ValueError(f"a line closes a block that is not open: {line.strip()}")
            stack.pop()
