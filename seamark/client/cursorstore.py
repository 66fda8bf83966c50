"""Where a device keeps its bookmark between runs. Any object with `load` and `save` will do."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from seamark.protocol.errors import InvalidCursor


@dataclass(frozen=True, slots=True)
class Bookmark:
    """A device's place in one user's log. It is one value, so its parts are never stored apart.

    Attributes:
        cursor: epoch and sequence, opaque.
        tenant, user: whose log it is a place in. None: unknown; then the first token decides.
    """

    cursor: str
    tenant: str | None = None
    user: str | None = None


class CursorStore(Protocol):
    """Keeps one bookmark, whole."""

    async def load(self) -> Bookmark | None:
        """The bookmark saved last, None if there is none."""
        ...

    async def save(self, bookmark: Bookmark) -> None:
        """Keep `bookmark`; when this returns, a later `load` gives it. Never called twice at the same time."""
        ...


class MemoryCursor:
    """Keeps the bookmark as long as the process lives: a restart begins where the gateway knows the device to be."""

    def __init__(self, bookmark: Bookmark | None = None) -> None:
        self.bookmark = bookmark

    @property
    def cursor(self) -> str | None:
        """The cursor of the bookmark."""
        return None if self.bookmark is None else self.bookmark.cursor

    async def load(self) -> Bookmark | None:
        return self.bookmark

    async def save(self, bookmark: Bookmark) -> None:
        self.bookmark = bookmark


class FileCursor:
    """Keeps the bookmark in a file that is replaced whole: a crash leaves the old one or the new one, never a part.

    One file belongs to one device. The bookmark of another user is not used; this user's first bookmark replaces it.

    Args:
        path: the file; its folder is made if it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    async def load(self) -> Bookmark | None:
        return await asyncio.to_thread(self._read)

    async def save(self, bookmark: Bookmark) -> None:
        await asyncio.to_thread(self._write, bookmark)

    def _read(self) -> Bookmark | None:
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Bookmark)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            raise InvalidCursor(f"{self.path} holds no cursor. Remove it to begin as a new device.") from wrong

    def _write(self, bookmark: Bookmark) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(bookmark))
                file.flush()
                # Without it the rename may reach the disk before the content: a power cut would leave an empty file.
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink()
            raise
