"""Where a device keeps its cursor between runs. Any object with `load` and `save` will do."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Protocol

from engine.errors import SeamarkError


class BadCursorFile(SeamarkError):
    """The cursor file cannot be read. Remove it to begin as a new device."""


class CursorStore(Protocol):
    """Keeps one cursor, whole: epoch and sequence are one value and must never be stored apart."""

    async def load(self) -> str | None:
        """The cursor saved last, None if there is none."""
        ...

    async def save(self, cursor: str) -> None:
        """Keep `cursor`; when this returns, a later `load` gives it. Never called twice at the same time."""
        ...


class MemoryCursor:
    """Keeps the cursor as long as the process lives: a restart begins where the gateway knows the device to be."""

    def __init__(self, cursor: str | None = None) -> None:
        self.cursor = cursor

    async def load(self) -> str | None:
        return self.cursor

    async def save(self, cursor: str) -> None:
        self.cursor = cursor


class FileCursor:
    """Keeps the cursor in a file that is replaced whole: a crash leaves the old one or the new one, never a part.

    One file belongs to one user and device.

    Args:
        path: the file; its folder is made if it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    async def load(self) -> str | None:
        return await asyncio.to_thread(self._read)

    async def save(self, cursor: str) -> None:
        await asyncio.to_thread(self._write, cursor)

    def _read(self) -> str | None:
        try:
            cursor = json.loads(self.path.read_bytes())["cursor"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as wrong:
            raise BadCursorFile(f"{self.path} holds no cursor. Remove it to begin as a new device.") from wrong
        if not isinstance(cursor, str):
            raise BadCursorFile(f"{self.path} holds no cursor. Remove it to begin as a new device.")
        return cursor

    def _write(self, cursor: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"cursor": cursor}, file)
                file.flush()
                # Without it the rename may reach the disk before the content: a power cut would leave an empty file.
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink()
            raise
