"""A record on its way to the sessions of its user: stored bytes, and the frame built around them once for all."""

from __future__ import annotations

import time
from typing import Final

from engine.broker.jetstream import Stored
from seamark.protocol.frames import record_frame, skip_frame
from seamark.protocol.records import EPOCH_HEADER, SKIP_AFTER_HEADER

_EPOCH: Final = f"\r\n{EPOCH_HEADER}:".encode()
_SKIP: Final = b"\r\nSeamark-Skip:"
_SKIP_AFTER: Final = f"\r\n{SKIP_AFTER_HEADER}:".encode()
_SKIPS: Final = b"\r\nSeamark-Skip"
_SEQUENCE: Final = b"\r\nNats-Sequence:"
_LAST_SEQUENCE: Final = b"\r\nNats-Last-Sequence:"


class Message:
    """One record.

    `headers` and `time` are as it was stored, `time` empty for a live copy: only where traces are exported they are looked at.
    `skip`: it is not for the screen, has expired, or its body is no JSON object (a marker of the broker, a stray write).
    """

    __slots__ = ("_epoch", "_frame", "_prev", "body", "headers", "seq", "skip", "time")

    def __init__(self, seq: int, body: bytes, headers: bytes, time: str = "") -> None:
        if body[:1] != b"{" or body[-1:] != b"}":
            body = body.strip()
        self.seq = seq
        self.body = body
        self.headers = headers
        self.time = time
        self.skip = (
            # One search finds both headers; nearly all records have neither.
            (_SKIPS in headers and _is_skipped(headers)) or body[:1] != b"{" or body[-1:] != b"}"
        )
        self._frame = b""
        self._prev = -1
        self._epoch = b""

    def frame(self, prev: int, epoch: bytes) -> bytes:
        """The frame for a session that holds the cursor `<epoch>.<prev>`. Sessions of one user mostly hold the same."""
        if prev != self._prev or epoch != self._epoch:
            seq = self.seq
            self._frame = skip_frame(seq, prev, epoch) if self.skip else record_frame(seq, prev, epoch, self.body)
            self._prev, self._epoch = prev, epoch
        return self._frame


def _is_skipped(headers: bytes) -> bool:
    """Whether the record is not for the screen, or was over before it was read from the log or its copy came."""
    return _SKIP in headers or 0 <= number(headers, _SKIP_AFTER) <= time.time() * 1000


def of_stored(stored: Stored) -> Message:
    """A message read from the log."""
    return Message(stored.seq, stored.payload, stored.headers, stored.time)


def number(headers: bytes, line: bytes) -> int:
    """The number in the last header line that begins with `line`; -1 when there is none. No copy of the block is made.

    The last one is the server's: it appends its own headers to the stored ones, and whoever wrote the record may have put a
    line of the same name among those.
    """
    start = headers.rfind(line)
    if start < 0:
        return -1
    start += len(line)
    try:
        return int(headers[start : headers.index(b"\r\n", start)])
    except ValueError:
        return -1


def live_position(headers: bytes) -> tuple[int, int, str]:
    """`(seq, prev, epoch)` of a republished copy: `epoch` empty where it has none, `seq` -1 where the message is no copy."""
    seq = number(headers, _SEQUENCE)
    if seq < 0:
        return -1, -1, ""
    start, epoch = headers.find(_EPOCH), ""
    if start >= 0:
        start += len(_EPOCH)
        epoch = headers[start : headers.index(b"\r\n", start)].decode("ascii", "replace").strip()
    return seq, number(headers, _LAST_SEQUENCE), epoch
