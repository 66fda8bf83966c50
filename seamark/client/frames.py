"""Frames of `seamark.v1` as the gateway sends them: one tagged union, one decoder."""

from __future__ import annotations

from typing import Any

import msgspec

from seamark.client.errors import ClientError


class UnreadCount(msgspec.Struct, frozen=True):
    """An absolute count of unread records and the position it is valid at; `stale` when it may be old."""

    count: int
    as_of: str | int | None = None
    stale: bool = False
    more: bool = False
    categories: dict[str, int] = {}


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="op"):
    """Answer to `hello`. `cursor` is where the log goes on; null when a reset follows, then `reason` says why."""

    session: str
    cursor: str | None = None
    resumed: bool = False
    reason: str | None = None
    unread: UnreadCount | None = None


class RecordFrame(msgspec.Struct, frozen=True, tag="record", tag_field="op"):
    """One record of the log. `prev` is the sequence of the last cursor this session was sent before it."""

    seq: int
    prev: int
    cursor: str
    record: msgspec.Raw


class Skip(msgspec.Struct, frozen=True, tag="skip", tag_field="op"):
    """A record of the log that is not for the screen: it only moves the position."""

    seq: int
    prev: int
    cursor: str


class LiveFrame(msgspec.Struct, frozen=True, tag="live", tag_field="op"):
    """Everything stored up to `cursor` was sent."""

    cursor: str


class Pong(msgspec.Struct, frozen=True, tag="pong", tag_field="op"):
    """Answer to `ping`, with the position verified so far."""

    cursor: str | None = None


class UnreadFrame(msgspec.Struct, frozen=True, tag="unread", tag_field="op"):
    """The unread count has changed to `count`; absolute, never an increment."""

    count: int
    as_of: str | int | None = None
    stale: bool = False
    more: bool = False
    categories: dict[str, int] = {}


class ResetFrame(msgspec.Struct, frozen=True, tag="reset", tag_field="op"):
    """The log cannot be continued from the client's cursor: here is a snapshot and where the log goes on after it."""

    reason: str
    cursor: str
    unread: UnreadCount | None = None
    inbox: list[dict[str, Any]] = []
    stale: bool = False


class ErrorFrame(msgspec.Struct, frozen=True, tag="error", tag_field="op"):
    """The gateway explains what was wrong; a close may follow."""

    code: str | int
    detail: str = ""


class Bye(msgspec.Struct, frozen=True, tag="bye", tag_field="op"):
    """The gateway is going: come back after `retry_after_ms`."""

    retry_after_ms: int = 0


class NowFrame(msgspec.Struct, frozen=True, tag="now", tag_field="op"):
    """An `at_most_once` event: live only, never stored, no sequence."""

    type: str = ""
    data: Any = None


Frame = Ready | RecordFrame | Skip | LiveFrame | Pong | UnreadFrame | ResetFrame | ErrorFrame | Bye | NowFrame


class _Op(msgspec.Struct):
    op: str


_decoder: msgspec.json.Decoder[Frame] = msgspec.json.Decoder(Frame)
_op_decoder = msgspec.json.Decoder(_Op)
_KNOWN = frozenset({"ready", "record", "skip", "live", "pong", "unread", "reset", "error", "bye", "now"})


def decode_frame(text: str | bytes) -> Frame | None:
    """The frame in `text`; None for an `op` this version does not know (a newer gateway may add some).

    Raises:
        ClientError: not a frame, or a known one without its fields.
    """
    try:
        return _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as refused:
        try:
            op = _op_decoder.decode(text).op
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ClientError(f"not a seamark.v1 frame: {refused}") from refused
        if op not in _KNOWN:
            return None
        raise ClientError(f"malformed {op!r} frame: {refused}") from refused


_encoder = msgspec.json.Encoder()


def encode(op: str, **fields: Any) -> str:
    """A client frame: `op` and those fields that are not None."""
    return _encoder.encode({"op": op} | {k: v for k, v in fields.items() if v is not None}).decode()
