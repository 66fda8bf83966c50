"""The replaced parser: every whole message comes out once, in order, however the bytes were cut; nothing else ends it."""

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import nats.errors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.protocol.parser import Parser

from engine.broker import wire
from engine.broker.wire import HotParser, encode_publish, header, header_lines, last_header, status


class Recorder:
    """A sink that writes down what it is given, in the words of nats-py's client."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self.seen.append(("msg", sid, bytes(subject), bytes(reply), headers or b"", data))

    async def _process_err(self, err_msg: str) -> None:
        self.seen.append(("err", err_msg.lower()))

    async def _process_ping(self) -> None:
        self.seen.append(("ping",))

    async def _process_pong(self) -> None:
        self.seen.append(("pong",))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.seen.append(("info", info))


def hot_parser(recorder: Recorder, *sids: int) -> HotParser:
    """A parser where `sids` have a handler that records the same way as the sink does."""
    parser = HotParser(recorder)

    def handler(sid: int) -> wire.Handler:
        return lambda subject, reply, headers, payload: recorder.seen.append(
            ("msg", sid, subject, reply, headers, payload)
        )

    parser.handlers.update({b"%d" % sid: handler(sid) for sid in sids})
    return parser


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """To the end, in one go: the parser itself never waits for anything."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
        pytest.fail("the parser waits for something")


def feed(parser: Any, chunks: list[bytes]) -> None:
    for chunk in chunks:
        run(parser.parse(chunk))


def feed_at_once(parser: HotParser, chunks: list[bytes]) -> None:
    """As a connection does whose read loop has nothing to read."""
    for chunk in chunks:
        rest = parser.take(chunk)
        if rest:
            run(parser.parse(rest))


HEADERS = b"NATS/1.0\r\nNats-Sequence: 17\r\nNats-Last-Sequence: 9\r\n\r\n"
STATUS = b"NATS/1.0 404 Message Not Found\r\n\r\n"
RECORDED = b"".join([
    b'INFO {"server_id":"N","headers":true,"connect_urls":["127.0.0.1:4222"]}\r\n',
    b"PING\r\n",
    b"PONG\r\n",
    b"+OK\r\n",
    b"MSG live.0.default.alice 1 5\r\nhello\r\n",
    b"MSG live.0.default.alice 2 _INBOX.x.1 5\r\nhello\r\n",
    b"MSG a 1 0\r\n\r\n",
    b"MSG a 3 _INBOX.y 12\r\nMSG a 1 5\r\n.\r\n",
    b"HMSG live.0.default.alice 1 %d %d\r\n%b{}\r\n" % (len(HEADERS), len(HEADERS) + 2, HEADERS),
    b"HMSG _INBOX.x.2 2 _INBOX.z %d %d\r\n%b\r\n" % (len(STATUS), len(STATUS), STATUS),
    b"HMSG a 3 reply.to %d %d\r\n%b\r\n\r\n\r\n" % (len(HEADERS), len(HEADERS) + 4, HEADERS),
    b'-ERR \'Permissions Violation for Publish to "events.Acme.x"\'\r\n',
    b"PING\r\n",
    b"MSG\ta  1\t 2\r\nok\r\n",
])  # fmt: skip


def whole() -> list[tuple[Any, ...]]:
    recorder = Recorder()
    feed(Parser(recorder), [RECORDED])
    return recorder.seen


def test_the_recorded_stream_gives_what_nats_py_makes_of_it() -> None:
    recorder = Recorder()
    feed(hot_parser(recorder, 1, 3), [RECORDED])
    assert recorder.seen == whole()
    assert len(recorder.seen) == 13


def test_a_stream_cut_anywhere_gives_the_same_messages() -> None:
    expected = whole()
    for feed_it in (feed, feed_at_once):
        for cut in range(len(RECORDED) + 1):
            recorder = Recorder()
            feed_it(hot_parser(recorder, 1), [RECORDED[:cut], RECORDED[cut:]])
            assert recorder.seen == expected, cut


def test_what_has_handlers_is_taken_at_once_and_the_rest_given_back_from_its_beginning() -> None:
    recorder = Recorder()
    parser = hot_parser(recorder, 1)
    hot, cold, half = b"MSG a 1 1\r\nx\r\n", b"MSG a 2 1\r\ny\r\n", b"MSG a 1 5\r\nhel"
    assert parser.take(hot * 2) == b""
    assert parser.take(half) == b""
    assert parser.take(b"lo\r\n" + hot + cold + hot) == cold + hot
    assert parser.take(hot + b"PING\r\n" + hot) == b"PING\r\n" + hot
    assert parser.take(hot + b"MSG a 1 five\r\n") == b"MSG a 1 five\r\n"
    assert parser.take(hot) == b""
    assert [seen[5] for seen in recorder.seen] == [b"x", b"x", b"hello", b"x", b"x", b"x", b"x"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_stream_in_small_reads_gives_the_same_messages(size: int) -> None:
    recorder = Recorder()
    feed(hot_parser(recorder, 1, 2), [RECORDED[i : i + size] for i in range(0, len(RECORDED), size)])
    assert recorder.seen == whole()


TOKENS = st.from_regex(rb"[A-Za-z0-9_$=-]{1,8}(\.[A-Za-z0-9_$=-]{1,8}){0,3}", fullmatch=True)
HEADER_BLOCKS = st.one_of(
    st.just(b""),
    st.lists(
        st.tuples(st.from_regex(rb"[A-Za-z-]{1,12}", fullmatch=True), st.from_regex(rb"[ -~]{0,20}", fullmatch=True)),
        max_size=4,
    ).map(lambda lines: b"NATS/1.0\r\n" + b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n"),
)


@st.composite
def messages(draw: Callable[..., Any]) -> bytes:
    subject, sid, reply = draw(TOKENS), draw(st.integers(1, 4)), draw(st.just(b"") | TOKENS)
    block, payload = draw(HEADER_BLOCKS), draw(st.binary(max_size=40) | st.just(RECORDED[:60]))
    ends = b"%d %d" % (len(block), len(block) + len(payload)) if block else b"%d" % len(payload)
    word = b"HMSG" if block else b"MSG"
    return b" ".join(filter(None, (word, subject, b"%d" % sid, reply, ends))) + b"\r\n" + block + payload + b"\r\n"


CONTROL = st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b'INFO {"ldm":true}\r\n', b"-ERR 'Slow Consumer'\r\n"])


@given(st.lists(messages() | CONTROL, max_size=12).map(b"".join), st.data())
def test_any_stream_gives_what_nats_py_makes_of_it(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    ours, at_once, theirs = Recorder(), Recorder(), Recorder()
    feed(hot_parser(ours, 1, 2), chunks)
    feed_at_once(hot_parser(at_once, 1, 2), chunks)
    feed(Parser(theirs), chunks)
    assert ours.seen == at_once.seen == theirs.seen


def test_a_header_block_of_64_kib_and_a_payload_of_2_mib_come_whole_from_small_reads() -> None:
    block = b"NATS/1.0\r\n" + b"".join(b"X-%04d: %b\r\n" % (i, b"v" * 50) for i in range(1080)) + b"\r\n"
    assert len(block) > 64_000
    payload = bytes(range(256)) * 8192
    stream = b"PING\r\nHMSG a 1 %d %d\r\n%b%b\r\nPONG\r\n" % (len(block), len(block) + len(payload), block, payload)
    recorder = Recorder()
    feed(hot_parser(recorder, 1), [stream[i : i + 1000] for i in range(0, len(stream), 1000)])
    assert recorder.seen == [("ping",), ("msg", 1, b"a", b"", block, payload), ("pong",)]


# --- what is not the protocol ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"HELLO",
        b"PINGPONG",
        b"MSG",
        b"MSG a 1",
        b"MSG a 1 r r 5",
        b"MSG a 1 -5",
        b"MSG a 1 five",
        b"MSG a x 0",
        b"MALICE a 1 0",
        b"HMSG a 1 5",
        b"HMSG a 1 r r 5 5",
        b"HMSG a 1 9 5",
        b"HMSG a 1 -1 5",
        b"MSG a 1 99999999999",
        b"MSG a 1 " + b"9" * 5000,
        b"INFO",
        b"INFO {",
        b"INFO []",
        b"INFO 7",
        b"INFO " + b"[" * 20_000,
        b"INFO \xff",
        b"\x00",
    ],
)
def test_a_line_that_is_not_the_protocol_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(nats.errors.ProtocolError):
        feed(hot_parser(Recorder(), 1), [line + b"\r\n" + b"x" * 10 + b"\r\n"])


def test_a_payload_longer_or_shorter_than_announced_is_a_protocol_error() -> None:
    for payload in (b"hell", b"hello!"):
        with pytest.raises(nats.errors.ProtocolError):
            feed(hot_parser(Recorder(), 1), [b"MSG a 1 5\r\n" + payload + b"\r\nPING\r\n"])


def test_an_endless_line_is_a_protocol_error_not_a_growing_buffer() -> None:
    parser = hot_parser(Recorder())
    with pytest.raises(nats.errors.ProtocolError):
        feed(parser, [b"INFO " + b"x" * 1000] * 100)


def test_after_a_protocol_error_or_a_reset_a_new_connection_starts_clean() -> None:
    recorder = Recorder()
    parser = hot_parser(recorder, 1)
    with pytest.raises(nats.errors.ProtocolError):
        feed(parser, [b"MSG a 1 5\r\nhel", b"lo..\r\n"])
    feed(parser, [RECORDED])
    feed(parser, [b"MSG a 1 500\r\nhalf"])
    parser.reset()
    feed(parser, [RECORDED])
    assert recorder.seen == whole() * 2


WORDS = st.sampled_from(
    [b"MSG", b"HMSG", b"PING", b"INFO", b"-ERR", b"+OK", b"a", b"1", b"2", b"0", b"5", b"-1", b"{}", b"", b"\x00"]
)
LINES = st.lists(WORDS | st.binary(max_size=6), max_size=7).map(b" ".join)


@settings(max_examples=400)
@given(st.lists(LINES | messages() | st.binary(max_size=30), max_size=6).map(b"\r\n".join), st.integers(1, 50))
def test_arbitrary_bytes_give_a_protocol_error_at_worst(stream: bytes, size: int) -> None:
    outcomes = []
    for feed_it in (feed, feed_at_once):
        recorder, failed = Recorder(), True
        parser = hot_parser(recorder, 1)
        # run() fails if the parser were to wait.
        with contextlib.suppress(nats.errors.ProtocolError):
            feed_it(parser, [stream[i : i + size] for i in range(0, len(stream), size)])
            failed = False
        assert sum(map(len, parser._chunks)) <= len(stream)
        outcomes.append((recorder.seen, failed))
    assert outcomes[0] == outcomes[1]


@settings(max_examples=400)
@given(st.integers(0, len(RECORDED) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_stream_gives_a_protocol_error_at_worst(at: int, noise: bytes, lost: int) -> None:
    parser = hot_parser(Recorder(), 1, 2, 3)
    with contextlib.suppress(nats.errors.ProtocolError):
        feed(parser, [RECORDED[:at] + noise + RECORDED[at + lost :]])


async def test_a_handler_that_raises_is_counted_and_does_not_stop_the_others() -> None:
    recorder = Recorder()
    parser = hot_parser(recorder, 1)

    def fail(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        raise RuntimeError("no")

    parser.handlers[b"9"] = fail
    await parser.parse(b"MSG a 9 1\r\nx\r\nMSG a 1 1\r\ny\r\nMSG a 9 1\r\nz\r\nPING\r\n")
    assert recorder.seen == [("msg", 1, b"a", b"", b"", b"y"), ("ping",)]
    assert parser.faults == 2


async def test_a_handler_may_add_and_remove_handlers() -> None:
    recorder = Recorder()
    parser = hot_parser(recorder, 1)

    def replace(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        del parser.handlers[b"9"], parser.handlers[b"1"]
        parser.handlers.update(hot_parser(recorder, 2).handlers)

    parser.handlers[b"9"] = replace
    await parser.parse(b"MSG a 9 1\r\nx\r\nMSG a 1 1\r\ny\r\nMSG a 2 1\r\nz\r\nMSG a 9 1\r\nw\r\n")
    assert [seen[1] for seen in recorder.seen] == [1, 2, 9]


# --- headers and publishing --------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[A-Za-z0-9-]{1,16}", fullmatch=True)
VALUES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(NAMES, VALUES, max_size=5), TOKENS, st.just(b"") | TOKENS, st.binary(max_size=40))
def test_what_is_published_is_what_a_server_reads(
    headers: dict[str, str], subject: bytes, reply: bytes, payload: bytes
) -> None:
    data = encode_publish(subject, reply, header_lines(headers), payload)
    # A server sends on what it got: PUB becomes MSG with a subscription's number.
    word, rest = data.split(b" ", 1)
    line, body = rest.split(b"\r\n", 1)
    words = line.split()
    words.insert(1, b"1")
    recorder = Recorder()
    feed(hot_parser(recorder, 1), [{b"PUB": b"MSG ", b"HPUB": b"HMSG "}[word] + b" ".join(words) + b"\r\n" + body])
    [(_, _, got_subject, got_reply, block, got_payload)] = recorder.seen
    assert (got_subject, got_reply, got_payload) == (subject, reply, payload)
    for name, value in headers.items():
        found = header(block, name.encode())
        assert found is not None
        assert found.decode() == value.encode().strip().decode()
    assert status(block) == 0


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=12), min_size=1, max_size=3))
def test_no_header_can_smuggle_another(headers: dict[str, str]) -> None:
    try:
        lines = header_lines(headers)
    except (ValueError, UnicodeEncodeError):
        return
    assert lines.count(b"\r\n") == len(headers)
    assert lines.replace(b"\r\n", b"").count(b"\n") == 0
    assert lines.replace(b"\r\n", b"").count(b"\r") == 0


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\r", "a\n", "a\t", "a\u2028b"])
def test_a_header_name_that_is_not_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="header"):
        header_lines({name: "x"})


@pytest.mark.parametrize("value", ["a\r\nNats-Rollup: all", "\n", "\r"])
def test_a_header_value_with_a_line_break_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="header"):
        header_lines({"X": value})


def test_a_header_is_found_by_its_whole_name_and_exact_case() -> None:
    lines = b"X-Nats-Sequence: 1\r\nNats-Sequence-X: 2\r\nnats-sequence: 3\r\nNats-Sequence:4\r\nNats-Sequence: 5\r\n"
    block = b"NATS/1.0\r\n" + lines + b"\r\n"
    assert header(block, b"Nats-Sequence") == b"4"
    assert header(block, b"Sequence") is None
    # What the server adds stands behind what a publisher may have written.
    assert last_header(block, b"Nats-Sequence") == b"5"
    assert last_header(block, b"Sequence") is None
    assert last_header(b"", b"Nats-Sequence") is None
    assert header(b"", b"Nats-Sequence") is None
    assert header(b"NATS/1.0\r\nA: \r\n\r\n", b"A") == b""


@pytest.mark.parametrize(
    ("block", "code", "words"),
    [
        (b"", 0, ""),
        (b"NATS/1.0\r\n\r\n", 0, ""),
        (b"NATS/1.0\r\nA: 404\r\n\r\n", 0, ""),
        (b"NATS/1.0 404\r\n\r\n", 404, ""),
        (b"NATS/1.0 404 Message Not Found\r\n\r\n", 404, "Message Not Found"),
        (b"NATS/1.0 409 Consumer Deleted\r\nNats-Pending-Messages: 5\r\n\r\n", 409, "Consumer Deleted"),
        (b"NATS/1.0 503\r\nNats-Subject: x\r\n\r\n", 503, ""),
        (b"NATS/1.0 abc\r\n\r\n", 0, None),
        (b"NATS/1.0 4", 0, None),
    ],
)
def test_a_status_is_read_from_its_line_only(block: bytes, code: int, words: str | None) -> None:
    assert status(block) == code
    if code:
        assert wire.description(block) == words


@given(st.binary(max_size=60), st.binary(max_size=8))
def test_reading_a_block_of_any_form_raises_nothing_unexpected(block: bytes, name: bytes) -> None:
    wire.description(block)
    assert 0 <= status(block) <= 999
    header(block + b"\r\n", name)
