"""Frames of `seamark.v1`, both ways: one definition for the gateway and the Python SDK.

Each side takes from a frame what it knows and leaves the rest, as the other side may be newer.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec

from seamark.protocol.errors import BadFrame, UnknownOp
from seamark.protocol.limits import REQUEST_ID_CHARS_MAX

PROTOCOL: Final = "seamark.v1"
"""The WebSocket sub-protocol."""

NOW: Final = "now"
"""The capability to be sent now messages."""

CAPABILITIES: Final[tuple[str, ...]] = (NOW,)
"""What this version can do beyond the first version of the protocol."""

encode: Final = msgspec.json.Encoder().encode
"""A frame as it is sent."""

# --- from the client --------------------------------------------------------------------------------------------------


class _Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="op"):
    """What all frames of a client share. `id`: the `error` that answers this frame names it."""

    id: Annotated[str, msgspec.Meta(max_length=REQUEST_ID_CHARS_MAX)] | None = None


class Hello(_Said, frozen=True, kw_only=True, tag="hello"):
    """The first frame. `token` may be absent where the handshake carried `Authorization: Bearer`.

    `snapshot`: the client has lost what it showed, so it gets a `reset` with a snapshot, whatever cursor it names.
    """

    token: str | None = None
    device: str
    cursor: str | None = None
    snapshot: bool = False
    capabilities: list[str] = []


class Ack(_Said, frozen=True, kw_only=True, tag="ack"):
    """Everything up to `cursor` has reached the device."""

    cursor: str


class Read(_Said, frozen=True, kw_only=True, tag="read"):
    """The user has read these ids, or everything up to a cursor, or everything sent on this session."""

    ids: list[str] | None = None
    up_to: str | None = None
    all: bool = False


class Ping(_Said, frozen=True, kw_only=True, tag="ping"):
    """Asks for a `pong`, which carries the position verified so far."""


class Refresh(_Said, frozen=True, kw_only=True, tag="refresh"):
    """A newer token of the same user: the session lives on until that one expires."""

    token: str


ClientFrame = Hello | Ack | Read | Ping | Refresh

# --- from the gateway -------------------------------------------------------------------------------------------------


class Unread(msgspec.Struct, frozen=True):
    """The unread count, absolute.

    Attributes:
        count: exact; with `more` that of the newest, so show `1000+`.
        as_of: of two counts of one session the one with the higher `as_of` is the newer. It means nothing else.
        categories: the counts of those that have a category, of the largest ones.
        stale: it may be old.
    """

    count: int
    as_of: int
    more: bool = False
    categories: dict[str, int] = {}
    stale: bool = False


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="op"):
    """Answer to `hello`. Resumed: the log goes on after `cursor`. Else `reason` says why not, and a `reset` follows."""

    session: str
    resumed: bool = False
    cursor: str | None = None
    seq: int | None = None
    reason: str | None = None
    unread: Unread | None = None
    capabilities: tuple[str, ...] = CAPABILITIES


class RecordFrame(msgspec.Struct, frozen=True, tag="record", tag_field="op"):
    """One record of the log. No record of the log is between `prev` and `seq`. `feed`: it is of another log than the user's."""

    seq: int
    prev: int
    cursor: str
    record: msgspec.Raw
    feed: str | None = None


class Skip(msgspec.Struct, frozen=True, tag="skip", tag_field="op"):
    """A record that is not for the screen: it only moves the position."""

    seq: int
    prev: int
    cursor: str
    feed: str | None = None


class LiveFrame(msgspec.Struct, frozen=True, tag="live", tag_field="op"):
    """Everything stored up to `cursor` was sent."""

    cursor: str
    seq: int


class Pong(msgspec.Struct, frozen=True, tag="pong", tag_field="op"):
    """Answer to `ping`, with the position verified so far."""

    cursor: str
    seq: int


class UnreadFrame(Unread, frozen=True, tag="unread", tag_field="op"):
    """The unread count has changed."""


class ResetFrame(msgspec.Struct, frozen=True, omit_defaults=True, tag="reset", tag_field="op"):
    """Forget what you show: this snapshot and the records after `cursor` replace it."""

    reason: str
    cursor: str
    seq: int
    unread: Unread | None
    inbox: list[dict[str, Any]]
    stale: bool = False
    feed: str | None = None


class ErrorFrame(msgspec.Struct, frozen=True, omit_defaults=True, tag="error", tag_field="op"):
    """Something asked for was not done. `id`: of the client's frame that asked for it, where that had one."""

    code: str
    detail: str = ""
    id: str | None = None


class Bye(msgspec.Struct, frozen=True, tag="bye", tag_field="op"):
    """The gateway is about to close with 1012: come back after so many milliseconds."""

    retry_after_ms: int = 0


class NowFrame(msgspec.Struct, frozen=True, tag="now", tag_field="op"):
    """A message that is never stored: no sequence, no cursor. Only clients that declare the capability `now` are sent it."""

    type: str = ""
    data: Any = None
    id: str | None = None


GatewayFrame = Ready | RecordFrame | Skip | LiveFrame | Pong | UnreadFrame | ResetFrame | ErrorFrame | Bye | NowFrame


def record_frame(seq: int, prev: int, epoch: bytes, record: bytes) -> bytes:
    """A `RecordFrame` around stored bytes, which are not decoded: the hot path."""
    return b'{"op":"record","seq":%d,"prev":%d,"cursor":"%b.%d","record":%b}' % (seq, prev, epoch, seq, record)


def skip_frame(seq: int, prev: int, epoch: bytes) -> bytes:
    """A `Skip`."""
    return b'{"op":"skip","seq":%d,"prev":%d,"cursor":"%b.%d"}' % (seq, prev, epoch, seq)


def unread_frame(unread: Unread) -> bytes:
    """An `UnreadFrame` with this count."""
    return b'{"op":"unread",' + encode(unread)[1:]


# --- decoding ---------------------------------------------------------------------------------------------------------


class _Head(msgspec.Struct):
    op: str
    id: str | None = None


_head: Final = msgspec.json.Decoder(_Head).decode
F = TypeVar("F")


class Decoder(Generic[F]):
    """Decodes the frames that one side may send.

    Args:
        frames: their union.
        ops: of these frames.
    """

    def __init__(self, frames: Any) -> None:
        self._decode: Any = msgspec.json.Decoder(frames).decode
        self._ops = {frame.__struct_config__.tag for frame in frames.__args__}

    def __call__(self, data: bytes | str) -> F:
        """The frame in `data`.

        Raises:
            UnknownOp: its `op` is none of this version.
            BadFrame: it is no JSON object, or a field is missing or not as it should be.
        """
        try:
            frame: F = self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            head = _head_of(data)
            if head is None or head.op in self._ops:
                raise BadFrame(str(error)) from error
            raise UnknownOp(head.op, request_id(data)) from None
        except RecursionError as error:
            raise BadFrame("nested too deeply") from error
        return frame


def _head_of(data: bytes | str) -> _Head | None:
    try:
        return _head(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def request_id(data: bytes | str) -> str | None:
    """The `id` of a frame that could not be obeyed; None where it has none that can be read."""
    head = _head_of(data)
    return None if head is None or head.id is None or len(head.id) > REQUEST_ID_CHARS_MAX else head.id


decode_client_frame: Final[Decoder[ClientFrame]] = Decoder(ClientFrame)
decode_gateway_frame: Final[Decoder[GatewayFrame]] = Decoder(GatewayFrame)
