"""Frames of `seamark.v1`: what a client may send (decoded strictly), what it is sent (built as bytes).

A record's frame is put together around the stored bytes: the body of a record is never decoded here.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from gateway.limits import DEVICE_BYTES, READ_IDS
from seamark.protocol.cursor import Cursor
from seamark.protocol.events import is_event_id
from seamark.protocol.limits import EVENT_ID_BYTES_MAX

PROTOCOL: Final = "seamark.v1"
"""The WebSocket sub-protocol."""


class BadFrame(ValueError):
    """A client's frame is not one of the protocol; the message says which field and why."""

    def __init__(self, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.field = field


class _Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    """What all client frames share: strict fields, `op` names the kind."""


class Hello(_Frame, frozen=True, tag="hello"):
    """The first frame. `token` may be absent when the handshake carried `Authorization: Bearer`.

    `snapshot`: the client has lost what it showed, so it gets a `reset` with a snapshot, whatever cursor it names.
    """

    device: str
    token: str | None = None
    cursor: str | None = None
    snapshot: bool = False


class Ack(_Frame, frozen=True, tag="ack"):
    """Everything up to `cursor` has reached the device."""

    cursor: str


class Read(_Frame, frozen=True, tag="read"):
    """The user has read these ids, or everything up to a cursor, or everything sent on this session."""

    ids: list[str] | None = None
    up_to: str | None = None
    all: bool = False


class Ping(_Frame, frozen=True, tag="ping"):
    """Asks for a `pong`, which carries the position verified so far."""


class Refresh(_Frame, frozen=True, tag="refresh"):
    """A newer token of the same user: the session lives on until that one expires."""

    token: str


ClientFrame = Hello | Ack | Read | Ping | Refresh

_decode = msgspec.json.Decoder(ClientFrame).decode
_encode = msgspec.json.Encoder().encode


def decode_frame(data: bytes) -> ClientFrame:
    """The frame in `data`.

    Raises:
        BadFrame: not JSON, an unknown `op`, an unknown or missing field, or a value out of bounds.
    """
    try:
        frame: ClientFrame = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadFrame(str(error)) from error
    except RecursionError as error:
        raise BadFrame("nested too deeply") from error
    if isinstance(frame, Read):
        check_read(frame)
    elif isinstance(frame, Hello):
        check_device(frame.device)
    return frame


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


# --- towards the client ---------------------------------------------------------------------------------------------


def record_frame(seq: int, prev: int, epoch: bytes, record: bytes) -> bytes:
    """`record`: the stored bytes of one record, and the cursor that a client holds once it has it."""
    return b'{"op":"record","seq":%d,"prev":%d,"cursor":"%b.%d","record":%b}' % (seq, prev, epoch, seq, record)


def skip_frame(seq: int, prev: int, epoch: bytes) -> bytes:
    """`skip`: a record that is not for the screen; it moves the cursor."""
    return b'{"op":"skip","seq":%d,"prev":%d,"cursor":"%b.%d"}' % (seq, prev, epoch, seq)


def live_frame(cursor: Cursor) -> bytes:
    """`live`: everything the log holds up to `cursor` has been sent."""
    return b'{"op":"live","cursor":"%b"}' % str(cursor).encode()


def pong_frame(cursor: Cursor) -> bytes:
    """`pong`: the answer to `ping`."""
    return b'{"op":"pong","cursor":"%b"}' % str(cursor).encode()


def ready_frame(session: str, cursor: Cursor | None, reason: str | None, unread: dict[str, Any] | None) -> bytes:
    """`ready`: the session is open. With `reason` it is not resumed, and a `reset` follows."""
    frame: dict[str, Any] = {"op": "ready", "session": session, "cursor": None, "resumed": reason is None}
    if reason is None:
        frame["cursor"] = str(cursor)
    else:
        frame["reason"] = reason
    frame["unread"] = unread
    return _encode(frame)


def reset_frame(
    reason: str, cursor: Cursor, unread: dict[str, Any] | None, inbox: list[Any], *, stale: bool = False
) -> bytes:
    """`reset`: forget what you hold; this snapshot and the records after `cursor` replace it."""
    frame: dict[str, Any] = {"op": "reset", "reason": reason, "cursor": str(cursor), "unread": unread, "inbox": inbox}
    if stale:
        frame["stale"] = True
    return _encode(frame)


def error_frame(code: str, detail: str) -> bytes:
    """`error`: something asked for was not done; the session goes on (or a close code follows)."""
    return _encode({"op": "error", "code": code, "detail": detail})


def bye_frame(retry_after_ms: int) -> bytes:
    """`bye`: the gateway is about to close with 1012; come back after so many milliseconds."""
    return b'{"op":"bye","retry_after_ms":%d}' % retry_after_ms


# --- RFC 6455 -------------------------------------------------------------------------------------------------------

_TEXT: Final = 0x81
_CLOSE: Final = 0x88
_PING: Final = 0x89
_PONG: Final = 0x8A


def text_header(size: int) -> bytes:
    """The head of an unmasked, unfragmented text frame of `size` bytes."""
    if size < 126:
        return bytes((_TEXT, size))
    if size < 65_536:
        return bytes((_TEXT, 126, size >> 8, size & 0xFF))
    return b"\x81\x7f" + size.to_bytes(8, "big")


def close_frame(code: int, reason: str) -> bytes:
    """A close frame; the reason is cut to what a control frame holds, between two characters: it must be UTF-8."""
    payload = code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode()
    return bytes((_CLOSE, len(payload))) + payload


PING_FRAME: Final = bytes((_PING, 0))


def pong_bytes(payload: bytes) -> bytes:
    """The protocol's answer to a client's protocol ping."""
    return bytes((_PONG, len(payload))) + payload
