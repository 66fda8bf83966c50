"""A record on its way to the sessions of its user: stored bytes, and the frame built around them once for all."""

from __future__ import annotations

import functools
import re
import time
from typing import Final, NamedTuple

from engine.broker.jetstream import Stored
from seamark.protocol.frames import record_frame, skip_frame
from seamark.protocol.records import EPOCH_HEADER, SKIP_AFTER_HEADER

_EPOCH: Final = f"\r\n{EPOCH_HEADER}:".encode()
_SKIP: Final = b"\r\nSeamark-Skip:"
_SKIP_AFTER: Final = f"\r\n{SKIP_AFTER_HEADER}:".encode()
_SKIPS: Final = b"\r\nSeamark-Skip"
_SEQUENCE: Final = b"\r\nNats-Sequence:"
_LAST_SEQUENCE: Final = b"\r\nNats-Last-Sequence:"
_POSITION: Final = re.compile(
    rb"\r\nNats-Sequence: ([0-9]++)\r\nNats-Time-Stamp: [^\r]++\r\nNats-Last-Sequence: ([0-9]++)\r\n\r\n"
).match
"""The end of the headers of a republished copy, as the server writes it."""


class Message:
    """One record.

    `headers` and `time` are as it was stored, `time` empty for a live copy: only where traces are exported they are looked at.
    `skip`: it is not for the screen, has expired, or its body is no JSON object (a marker of the broker, a stray write).
    """

    __slots__ = ("_epoch", "_frame", "_prev", "body", "headers", "seq", "skip", "time")

    def __init__(self, seq: int, body: bytes, headers: bytes, time: str = "") -> None:
        is_object = body[:1] == b"{" and body[-1:] == b"}"
        if not is_object:
            body = body.strip()
            is_object = body[:1] == b"{" and body[-1:] == b"}"
        self.seq = seq
        self.body = body
        self.headers = headers
        self.time = time
        # One search finds both headers; nearly all records have neither. By `find`: `in` takes twice as long.
        self.skip = (headers.find(_SKIPS) >= 0 and _is_skipped(headers)) or not is_object
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


def live_position(headers: bytes) -> tuple[int, int]:
    """`(seq, prev)` of a republished copy: `seq` -1 where the message is no copy."""
    start = headers.rfind(_SEQUENCE)
    if start < 0:
        return -1, -1
    found = _POSITION(headers, start)
    if found is not None:
        return int(found[1]), int(found[2])
    seq = number(headers, _SEQUENCE)
    return (seq, number(headers, _LAST_SEQUENCE)) if seq >= 0 else (-1, -1)


class SaidEpoch(NamedTuple):
    """What a copy says of the incarnation of its log, in `text`; empty where it says nothing.

    `start`: headers that begin so name the same epoch, so they need not be searched.
    """

    start: bytes
    text: str


NO_EPOCH: Final = SaidEpoch(b"\0", "")  # no headers begin with NUL


def epoch_in(headers: bytes) -> SaidEpoch:
    """The incarnation of its log that a copy names."""
    start = headers.find(_EPOCH)
    if start < 0:
        return NO_EPOCH
    start += len(_EPOCH)
    return _epoch_of(headers[start : headers.index(b"\r\n", start)])


@functools.lru_cache(maxsize=256)
def _epoch_of(value: bytes) -> SaidEpoch:
    """Cached: one object for all users of a log."""
    return SaidEpoch(b"NATS/1.0%b%b\r\n" % (_EPOCH, value), value.decode("ascii", "replace").strip())
