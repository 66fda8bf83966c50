"""Keeps what is compared of a projection on disk, divided by user: each part fits into memory, however large the whole is."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.errors import InvalidSetting

ITEMS_PER_PART: Final = 50_000
"""Some 20 MB in memory. All items of one user are in one part."""

PARTS_MAX: Final = 4096
"""Each part is a file. With 500 million items each holds 120 000."""

BUFFERED_BYTES: Final = 32 << 20
"""Buffers are written when they hold this much, so that each write has a few KB even with the most files."""

Users = dict[str, tuple[list[Any], list[Any]]]
"""For each user (`<tenant>.<user>`, as tokens) what the streams say, and what is stored."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[int, str, Any]).decode
_LENGTH: Final = 4


class Spill:
    """Items of two sides, by user. They come back in the order in which they were added.

    Args:
        folder: an empty folder, with room for some 300 bytes an item.
        items: about how many items each side will have.
    """

    def __init__(self, folder: Path, items: int) -> None:
        self._folder = folder
        self.parts = max(1, min(PARTS_MAX, items // ITEMS_PER_PART + 1))
        self._buffers = [bytearray() for _ in range(self.parts)]
        self._buffered = 0

    def said(self, user: str, item: Any) -> None:
        """An item that a stream gives: what msgpack knows; tuples come back as lists."""
        self._add(user, item, 0)

    def stored(self, user: str, item: Any = None) -> None:
        """An item that is stored."""
        self._add(user, item, 1)

    def _add(self, user: str, item: Any, side: int) -> None:
        packed = _encode((side, user, item))
        buffer = self._buffers[zlib.crc32(user.encode()) % self.parts]
        buffer += len(packed).to_bytes(_LENGTH)
        buffer += packed
        self._buffered += _LENGTH + len(packed)
        if self._buffered > BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the buffers; call it before anything is read."""
        for number, buffer in enumerate(self._buffers):
            if buffer:
                try:
                    with self._path(number).open("ab") as file:
                        file.write(buffer)
                except OSError as error:
                    detail = f"{self._folder} cannot be written ({error.strerror})"
                    raise InvalidSetting(f"{detail}: set TMPDIR to a folder with more room") from error
                buffer.clear()
        self._buffered = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04}"

    def take(self, number: int) -> Users:
        """The items of one part, which is removed from the disk."""
        users: Users = {}
        path = self._path(number)
        if path.exists():
            with path.open("rb") as file:
                while length := file.read(_LENGTH):
                    side, user, item = _decode(file.read(int.from_bytes(length)))
                    users.setdefault(user, ([], []))[side].append(item)
            path.unlink()
        return users
