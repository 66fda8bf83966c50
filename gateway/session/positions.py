"""Which position a client's frame names, held against what its session was sent."""

from __future__ import annotations

from gateway.session.follower import Follower
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.errors import BadFrame
from seamark.protocol.frames import Read


class StaleCursor(Exception):
    """A cursor belongs to another incarnation of the log: nobody's fault, but nothing can be done with it."""


def plainly_acknowledged(data: bytes, follower: Follower) -> int | None:
    """The sequence that a frame acknowledges, where it is an `ack` as SDKs write it, of a cursor that was sent.

    None: it may be one all the same; `decode_client_frame` and `acknowledged` tell. Nearly all frames are such acks, and
    decoding one takes three times as long.
    """
    opening = follower.ack_opening
    digits = data[len(opening) : -2]
    if (
        data.startswith(opening)
        and data.endswith(b'"}')
        and digits.isdigit()
        and len(digits) < 20
        and digits[0] != 0x30
    ):
        seq = int(digits)
        if follower.sent_before_reset < seq <= follower.sent_max:
            return seq
    return None


def acknowledged(text: str, follower: Follower) -> int | None:
    """The sequence an `ack` names; None for one that may have crossed a reset on its way.

    Raises:
        BadFrame, InvalidCursor: the session was never sent that cursor.
    """
    epoch, seq = parse_cursor(text)
    if epoch != follower.epoch:
        if epoch == follower.former_epoch and epoch:
            return None
        raise BadFrame("`ack` names a cursor that was never sent")
    if seq <= follower.sent_before_reset:
        return None
    if seq > follower.sent_max:
        raise BadFrame("`ack` is beyond the last frame sent")
    return seq


def read_up_to(frame: Read, follower: Follower) -> int | None:
    """The sequence a `read` reaches to; None when it names ids.

    Raises:
        BadFrame, InvalidCursor: the session was never sent that cursor, or nothing yet.
        StaleCursor: it belongs to another incarnation of the log, or to what a reset took back.
    """
    if not follower.epoch:
        raise BadFrame("`read` before `ready`")
    if frame.all:
        return follower.sent
    if frame.up_to is None:
        return None
    cursor = parse_cursor(frame.up_to)
    if cursor.epoch != follower.epoch:
        raise StaleCursor("`read.up_to` belongs to another incarnation of the log")
    if follower.sent_max < cursor.seq <= follower.sent_before_reset:
        raise StaleCursor("`read.up_to` names what a reset took back")
    if cursor.seq > follower.sent_max:
        raise BadFrame("`read` is beyond the last frame sent")
    return cursor.seq
