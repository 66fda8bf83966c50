"""What the gateway asks of a client's frames beyond their form, and how frames of a WebSocket look on the wire."""

from __future__ import annotations

import functools
import struct
from typing import Final

from gateway.limits import DEVICE_BYTES, READ_IDS
from seamark.protocol.errors import BadFrame
from seamark.protocol.events import is_event_id
from seamark.protocol.frames import Read
from seamark.protocol.limits import EVENT_ID_BYTES_MAX


def check_device(device: str) -> str:
    """`device` itself when it can name a device: 1 to 128 bytes of printable text.

    Raises:
        BadFrame: it cannot.
    """
    if not device.isprintable() or not 1 <= len(device.encode("utf-8", "surrogatepass")) <= DEVICE_BYTES:
        raise BadFrame(f"`device` must be 1 to {DEVICE_BYTES} bytes of printable text", field="device")
    return device


def check_read(frame: Read) -> None:
    """Pass a `read` that names exactly one way of saying what was read, within bounds.

    Raises:
        BadFrame: it does not.
    """
    if (frame.ids is not None) + (frame.up_to is not None) + frame.all != 1:
        raise BadFrame("a read takes exactly one of `ids`, `up_to` and `all`")
    if frame.ids is not None:
        if not 1 <= len(frame.ids) <= READ_IDS:
            raise BadFrame(f"`ids` must name 1 to {READ_IDS} records", field="ids")
        if not all(map(is_event_id, frame.ids)):
            raise BadFrame(
                f"`ids` must be ids of records, each 1 to {EVENT_ID_BYTES_MAX} printable ASCII characters",
                field="ids",
            )


ACK_OPENING: Final = b'{"op":"ack",'
"""How an `ack` begins as SDKs write it. Written otherwise it is the same frame."""


@functools.lru_cache(maxsize=256)
def epoch_in_frames(epoch: str) -> tuple[bytes, bytes]:
    """`epoch` as bytes, and the bytes up to the sequence with which SDKs begin an `ack` of a cursor of this epoch.

    Cached, so that all sessions share them: there is an epoch for each log, and former ones for a while.
    """
    return epoch.encode(), b'%b"cursor":"%b.' % (ACK_OPENING, epoch.encode())


# --- RFC 6455 -------------------------------------------------------------------------------------------------------

_TEXT: Final = 0x81
_TEXT_16: Final = 0x817E
"""The first two bytes of a text frame whose size follows in 16 bits."""

_pack_16: Final = struct.Struct(">HH").pack
_CLOSE: Final = 0x88
_PING: Final = 0x89
_PONG: Final = 0x8A


def text_header(size: int) -> bytes:
    """The head of an unmasked, unfragmented text frame of `size` bytes."""
    if size < 126:
        return bytes((_TEXT, size))
    if size < 65_536:
        return _pack_16(_TEXT_16, size)
    return b"\x81\x7f" + size.to_bytes(8, "big")


def close_frame(code: int, reason: str) -> bytes:
    """A close frame; the reason is cut to what a control frame holds, between two characters: it must be UTF-8."""
    payload = code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode()
    return bytes((_CLOSE, len(payload))) + payload


PING_FRAME: Final = bytes((_PING, 0))


def pong_bytes(payload: bytes) -> bytes:
    """The protocol's answer to a client's protocol ping."""
    return bytes((_PONG, len(payload))) + payload
