"""Frames of `seamark.v1`: what one side sends the other side reads, and what is newer than this version disturbs neither."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.acks import AckBody
from gateway.api.inbox import ReadBody
from gateway.carriers.sse import SessionQuery
from gateway.http.problems import field_of
from gateway.session.frames import check_device, check_read
from seamark.protocol.errors import BadFrame, UnknownOp
from seamark.protocol.frames import (
    Ack,
    Bye,
    ClientFrame,
    ErrorFrame,
    GatewayFrame,
    Hello,
    LiveFrame,
    NowFrame,
    Ping,
    Pong,
    Read,
    Ready,
    RecordFrame,
    Refresh,
    ResetFrame,
    Skip,
    Unread,
    UnreadFrame,
    decode_client_frame,
    decode_gateway_frame,
    encode,
    record_frame,
    request_id,
    skip_frame,
    unread_frame,
)

FROM_CLIENTS: list[ClientFrame] = [
    Hello(device="d"),
    Hello(id="1", token="t", device="d", cursor="e.7", snapshot=True, capabilities=["feeds"]),
    Ack(cursor="e.7"),
    Read(ids=["a", "b"]),
    Read(id="2", up_to="e.7"),
    Read(all=True),
    Ping(),
    Refresh(token="t"),
]
COUNT = Unread(3, 7, more=True, categories={"orders": 1}, stale=True)
FROM_GATEWAYS: list[GatewayFrame] = [
    Ready("s", True, "e.7", 7, unread=COUNT, capabilities=("feeds",)),
    Ready("s", reason="new"),
    RecordFrame(7, 3, "e.7", msgspec.Raw(b'{"id":"e1"}')),
    RecordFrame(7, 3, "e.7", msgspec.Raw(b"{}"), feed="topic:news"),
    Skip(7, 3, "e.7"),
    LiveFrame("e.7", 7),
    Pong("e.7", 7),
    UnreadFrame(3, 7),
    ResetFrame("new", "e.7", 7, None, []),
    ResetFrame("epoch", "e.7", 7, COUNT, [{"id": "e1"}], stale=True),
    ErrorFrame("bad_frame", 'with "quotes"', "1"),
    Bye(250),
    NowFrame("demo.typing", {"who": "bob"}),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@pytest.mark.parametrize("frame", FROM_CLIENTS, ids=lambda frame: type(frame).__name__)
def test_what_a_client_says_a_gateway_reads(frame: ClientFrame) -> None:
    assert decode_client_frame(encode(frame)) == frame


@pytest.mark.parametrize("frame", FROM_GATEWAYS, ids=lambda frame: type(frame).__name__)
def test_what_a_gateway_says_a_client_reads(frame: GatewayFrame) -> None:
    assert decode_gateway_frame(encode(frame)) == frame


def test_frames_of_the_hot_path_are_those_of_the_table() -> None:
    assert decode_gateway_frame(record_frame(7, 3, b"e", b'{"id":"e1"}')) == RecordFrame(
        7, 3, "e.7", msgspec.Raw(b'{"id":"e1"}')
    )
    assert decode_gateway_frame(skip_frame(7, 3, b"e")) == Skip(7, 3, "e.7")
    assert decode_gateway_frame(unread_frame(COUNT)) == UnreadFrame(*msgspec.structs.astuple(COUNT))


@pytest.mark.parametrize("frame", [*FROM_CLIENTS, *FROM_GATEWAYS], ids=lambda frame: type(frame).__name__)
def test_fields_of_a_newer_side_are_passed_over(frame: ClientFrame | GatewayFrame) -> None:
    newer = {**json.loads(encode(frame)), "sparkle": {"colour": [1]}, "parts": {}}
    decode: Any = decode_client_frame if frame in FROM_CLIENTS else decode_gateway_frame
    assert decode(json.dumps(newer, separators=(",", ":")).encode()) == frame


DECODERS: Any = {"client": decode_client_frame, "gateway": decode_gateway_frame}


@pytest.mark.parametrize("side", DECODERS)
def test_an_op_of_a_newer_side_is_told_apart_from_what_is_no_frame(side: str) -> None:
    with pytest.raises(UnknownOp, match="sparkle") as unknown:
        DECODERS[side](b'{"op":"sparkle","x":1,"id":"7"}')
    assert unknown.value.id == "7"
    with pytest.raises(UnknownOp) as unknown:
        DECODERS[side](b'{"op":"sparkle","id":"' + b"x" * 65 + b'"}')
    assert unknown.value.id is None, "it would be sent back, however long it is"
    known_op_without_its_fields = b'{"op":"ack"}' if side == "client" else b'{"op":"record"}'
    for wrong in (b"", b"{", b"[]", b"{}", b'{"op":5}', known_op_without_its_fields, b'{"op":"\xff"}', b"[" * 30_000):
        with pytest.raises(BadFrame):
            DECODERS[side](wrong)


@given(JSON)
def test_whatever_json_a_client_sends_is_a_frame_or_said_to_be_none(value: Any) -> None:
    try:
        frame = decode_client_frame(json.dumps(value).encode("utf-8", "surrogatepass"))
    except (BadFrame, UnknownOp):
        return
    assert isinstance(frame, ClientFrame)


@given(st.binary())
def test_whatever_bytes_are_sent_are_no_frame(data: bytes) -> None:
    for decode in (decode_client_frame, decode_gateway_frame):
        with pytest.raises((BadFrame, UnknownOp)):  # Hypothesis knows how to write JSON
            decode(data)


def test_the_request_of_a_frame_that_cannot_be_obeyed_is_known_where_it_can_be_read() -> None:
    assert request_id(b'{"op":"ack","id":"r1","cursor":5}') == "r1"
    for wrong in (b'{"op":"ack"}', b'{"op":"ack","id":5}', b'{"op":"ack","id":"' + b"x" * 65 + b'"}'):
        assert request_id(wrong) is None
    with pytest.raises(BadFrame, match="id"):
        decode_client_frame(b'{"op":"ping","id":"' + b"x" * 65 + b'"}')


@pytest.mark.parametrize("device", ["", "x" * 129, "é" * 65, "a\nb", "a\0b"])
def test_a_device_that_cannot_be_is_a_bad_frame(device: str) -> None:
    with pytest.raises(BadFrame):
        check_device(device)


@pytest.mark.parametrize(
    "frame", [Read(), Read(ids=["a"], all=True), Read(ids=[]), Read(ids=["a"] * 501), Read(ids=[""])], ids=repr
)
def test_a_read_says_in_one_way_what_was_read(frame: Read) -> None:
    with pytest.raises(BadFrame):
        check_read(frame)


@pytest.mark.parametrize(
    ("form", "said", "field"),
    [
        (AckBody, {"device": "", "after": "e.1", "cursor": "e.2"}, "device"),
        (ReadBody, {"device": "a", "ids": []}, "ids"),
        (ReadBody, {"device": "a"}, None),
        (SessionQuery, {"device": "a\nb"}, "device"),
    ],
)
def test_a_request_is_refused_for_what_would_be_a_bad_frame(form: Any, said: dict[str, Any], field: str | None) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(said, form, strict=False)
    assert field_of(refused.value) == field
