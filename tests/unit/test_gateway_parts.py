"""The parts of a session that need no network: frames, outlets, timers, receipts."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.broker.jetstream import Outgoing
from engine.buckets import Buckets
from gateway.carriers.poll import PollOutlet
from gateway.limits import ROOM_BYTES, WRITE_HIGH_BYTES, WRITE_LOW_BYTES
from gateway.log.live import UserLog
from gateway.log.message import Message, epoch_in, live_position
from gateway.session import frames
from gateway.session.outlet import EventStreamOutlet, Flusher, WebSocketOutlet
from gateway.session.receipts import Receipts, Tally
from gateway.session.wheel import Wheel
from seamark.protocol import close_codes
from seamark.protocol.close_codes import NO_PONG, TABLE
from seamark.protocol.frames import Ready, ResetFrame, encode, record_frame, skip_frame
from seamark.protocol.records import epoch_line

# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_the_head_of_a_text_frame_tells_its_size(size: int) -> None:
    head = frames.text_header(size)
    assert head[0] == 0x81
    told = head[1] if head[1] < 126 else int.from_bytes(head[2:], "big")
    assert told == size
    assert len(head) == (2 if size < 126 else 4 if size < 65_536 else 10)


def test_a_reason_is_never_cut_inside_a_character() -> None:
    # A browser takes broken UTF-8 in a close frame for a protocol error and shows 1002 instead of our code.
    assert frames.close_frame(4400, "é" * 300)[4:].decode() == "é" * 61


def test_the_reason_of_a_close_frame_fits_a_control_frame() -> None:
    frame = frames.close_frame(4400, "x" * 300)
    assert (frame[0], frame[1]) == (0x88, 125)
    assert int.from_bytes(frame[2:4], "big") == 4400


def test_close_codes_are_distinct_and_in_the_range_for_applications() -> None:
    assert len({row.code for row in TABLE}) == len({row.name for row in TABLE}) == len(TABLE)
    assert all(4_400 <= row.code < 4_500 or row.code in (1000, 1011, 1012, 1013) for row in TABLE)
    assert set(TABLE) == {value for value in vars(close_codes).values() if isinstance(value, close_codes.CloseCode)}


def test_the_documentation_lists_every_close_code_with_what_to_do() -> None:
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    rows = re.findall(r"^\| (\d{4}) \| `(\w+)` \| (\w+)[^|]*\|", text, re.MULTILINE)
    assert {(int(code), name, then == "reconnect") for code, name, then in rows} == {
        (row.code, row.name, row.reconnect) for row in TABLE
    }


# --- records --------------------------------------------------------------------------------------------------------

HEADERS = (
    b"NATS/1.0\r\ntraceparent: 00-0-0-00\r\nNats-Stream: LOG-1\r\nNats-Subject: log.1.a.b\r\nNats-Sequence: 17\r\n"
    b"Nats-Time-Stamp: x\r\nNats-Last-Sequence: 12\r\n\r\n"
)


def test_a_live_copy_tells_its_sequence_and_the_one_before() -> None:
    assert live_position(HEADERS) == (17, 12)
    assert live_position(HEADERS.replace(b" 12", b" 0")) == (17, 0)
    assert live_position(b"") == (-1, -1)
    assert live_position(b"NATS/1.0\r\nNats-Last-Sequence: 12\r\n\r\n") == (-1, -1)
    # Whoever writes a record may write such lines, too; the server's own are the last.
    forged = b"NATS/1.0\r\nNats-Sequence: 3\r\nNats-Last-Sequence: 2"
    assert live_position(forged + HEADERS.removeprefix(b"NATS/1.0")) == (17, 12)
    # A server that writes them in another order, or more of them, says the same.
    stamp, more = b"Nats-Time-Stamp: x\r\n", b"Nats-Last-Sequence: 12\r\n"
    assert live_position(HEADERS.replace(stamp + more, more + stamp)) == (17, 12)
    assert live_position(HEADERS.replace(more, more + b"Nats-More: 1\r\n")) == (17, 12)


class Heard(list[tuple[int, int, str]]):
    """Takes note of live copies."""

    def live(self, seq: int, prev: int, message: Message, epoch: str) -> None:
        self.append((seq, prev, epoch))


def test_each_live_copy_is_passed_on_with_the_log_it_was_written_for() -> None:
    log, heard = UserLog(1, "a", "b"), Heard()
    log.listeners = [heard]  # type: ignore[list-item] # of a listener it has what copies need
    first, last = HEADERS.split(b"\r\n", 1)
    # As batches and as single appends have it, as other lines come before it, and as it is missing.
    lines = [b"", epoch_line("q2o54586"), epoch_line("q2o54586"), b"Seamark-Epoch: q2o54586\r\n", epoch_line("a1"), b""]
    lines += [b"A: b\r\n" + epoch_line("c2") + epoch_line("d3"), epoch_line("c2"), epoch_line("c22"), b"A: b\r\n"]
    for line in lines:
        log.on_copy(b"", b"", first + b"\r\n" + line + last, b"{}")
    epochs = ["", "q2o54586", "q2o54586", "q2o54586", "a1", "", "c2", "c2", "c22", ""]
    assert heard == [(17, 12, epoch) for epoch in epochs]
    assert [epoch_in(first + b"\r\n" + line + last).text for line in lines] == epochs


def test_the_last_of_several_sequences_in_the_headers_counts_as_it_is_the_servers() -> None:
    copied = b"NATS/1.0\r\nNats-Sequence: 4\r\nNats-Last-Sequence: 3\r\n" + HEADERS.removeprefix(b"NATS/1.0\r\n")
    assert live_position(copied) == (17, 12)
    assert live_position(b"NATS/1.0\r\nNats-Sequence: nonsense\r\n\r\n") == (-1, -1)


def test_the_frame_of_a_record_is_built_once_for_all_who_hold_the_same_cursor() -> None:
    message = Message(17, b'{"id":"e"}', HEADERS)
    assert message.frame(12, b"e1") is message.frame(12, b"e1")
    assert json.loads(message.frame(11, b"e1"))["prev"] == 11
    assert json.loads(message.frame(11, b"e2"))["cursor"] == "e2.17"


@pytest.mark.parametrize(("body", "headers", "op"), [
    (b'{"id":"e"}', HEADERS, "record"),
    (b' {"id":"e"}\n', HEADERS, "record"),
    (b'{"id":"e"}', HEADERS.replace(b"Nats-Stream", b"Seamark-Skip: 1\r\nNats-Stream"), "skip"),
    (b"", HEADERS, "skip"), (b"[1]", HEADERS, "skip"), (b"{", HEADERS, "skip"), (b"\xff", HEADERS, "skip"),
])  # fmt: skip
def test_what_is_no_record_for_the_screen_is_skipped(body: bytes, headers: bytes, op: str) -> None:
    assert json.loads(Message(17, body, headers).frame(12, b"e1"))["op"] == op


# --- outlets --------------------------------------------------------------------------------------------------------


class Pipe(asyncio.Transport):
    """A transport whose peer takes bytes when the test says so; it pauses its protocol as asyncio's own do."""

    def __init__(self, takes: int = 0) -> None:
        super().__init__()
        self.takes = takes
        self.written: list[bytes] = []
        self.unsent = 0
        self.aborted = self.closed = False
        self.on_resume: Any = None
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert (high, low) == (WRITE_HIGH_BYTES, WRITE_LOW_BYTES)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))
        self.unsent = max(0, self.unsent + len(data) - self.takes)
        self.paused = self.paused or self.unsent > WRITE_HIGH_BYTES

    def drain(self) -> None:
        self.unsent = 0
        if self.paused:
            self.paused = False
            self.on_resume()

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


async def turn() -> None:
    """Two turns of the loop: the flusher's, and that of what it schedules."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_frames_of_one_turn_leave_in_one_write() -> None:
    pipe, flusher = Pipe(takes=1 << 20), Flusher()
    outlet = WebSocketOutlet(pipe, flusher, Wheel())
    for number in range(4):
        outlet.send(b'{"n":%d}' % number)
    assert pipe.written == []
    await turn()
    assert pipe.written == [b"".join(b'\x81\x07{"n":%d}' % number for number in range(4))]
    outlet.send(b"{}")
    await turn()
    assert len(pipe.written) == 2


async def test_a_socket_that_does_not_read_costs_its_bound_and_one_frame_and_is_told_when_it_drains() -> None:
    pipe = Pipe()
    outlet = WebSocketOutlet(pipe, Flusher(), Wheel())
    called: list[int] = []
    outlet.on_writable = lambda: called.append(pipe.unsent)
    pipe.on_resume = outlet.writable
    frame = b"x" * 10_000
    sent = 0
    while outlet.room():
        outlet.send(frame)
        sent += 1
    await turn()
    assert sent == ROOM_BYTES // len(frame) + 1
    assert not outlet.room()
    assert called == []
    assert outlet.stuck_seconds() >= 0
    pipe.drain()
    assert called == [0]
    assert outlet.room()


async def test_a_socket_that_takes_all_at_once_is_told_without_ever_being_paused() -> None:
    pipe = Pipe(takes=1 << 20)
    outlet = WebSocketOutlet(pipe, Flusher(), Wheel())
    called: list[int] = []
    outlet.on_writable = lambda: called.append(1)
    while outlet.room():
        outlet.send(b"x" * 10_000)
    await turn()
    assert called == [1]


async def test_after_its_close_frame_an_outlet_takes_nothing_and_aborts_when_the_client_lingers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.session.outlet.LINGER_SECONDS", 0.1)
    pipe = Pipe(takes=1 << 20)
    outlet = WebSocketOutlet(pipe, Flusher(), Wheel())
    outlet.send(b"{}")
    outlet.close(NO_PONG, "late")
    outlet.send(b"{}")
    outlet.close(NO_PONG, "again")
    assert b"".join(pipe.written) == b"\x81\x02{}" + frames.close_frame(4408, "late")
    async with asyncio.timeout(20):
        while not pipe.aborted:
            await asyncio.sleep(0.01)


async def test_an_event_stream_frames_events_as_chunks_and_keeps_line_breaks_out() -> None:
    pipe = Pipe(takes=1 << 20)
    outlet = EventStreamOutlet(pipe, Flusher(), Wheel())
    outlet.send(b'{"op":"x",\r\n"a":1}', b"abcdefgh", 7)
    outlet.send(b"{}")
    outlet.ping()
    await turn()
    text = b'id: abcdefgh.7\ndata: {"op":"x",  "a":1}\n\ndata: {}\n\n:\n\n'
    assert pipe.written == [b"%x\r\n%b\r\n" % (len(text), text)]


async def test_a_poll_takes_as_many_records_as_asked_for_and_no_more() -> None:
    outlet = PollOutlet(2)
    outlet.send(encode(Ready("s", True, "e.0", 0)), b"e", 0)
    outlet.send(record_frame(1, 0, b"e", b"{}"), b"e", 1)
    assert outlet.room()
    outlet.send(skip_frame(2, 1, b"e"), b"e", 2)
    assert not outlet.room()
    await turn()
    assert outlet.answered.done()
    answer = json.loads(outlet.body())
    assert (answer["after"], answer["cursor"], answer["live"]) == ("e.0", "e.2", False)
    assert len(answer["records"]) == 2


async def test_a_poll_forgets_what_a_reset_takes_back() -> None:
    outlet = PollOutlet(5)
    outlet.send(record_frame(7, 0, b"e", b"{}"), b"e", 7)
    outlet.send(encode(ResetFrame("epoch", "f.0", 0, None, [])), b"f", 0)
    outlet.send(record_frame(1, 0, b"f", b"{}"), b"f", 1)
    answer = json.loads(outlet.body())
    assert (answer["after"], answer["cursor"], answer["reset"]["cursor"]) == ("f.0", "f.1", "f.0")
    assert [frame["cursor"] for frame in answer["records"]] == ["f.1"]


# --- timers ---------------------------------------------------------------------------------------------------------


async def test_the_wheel_calls_in_order_of_time_never_early_and_survives_a_failing_call() -> None:
    wheel, loop = Wheel(), asyncio.get_running_loop()
    calls: list[tuple[float, float]] = []
    done = asyncio.Event()
    began = loop.time()
    for delay in (0.3, 0.1, 0.2, 0.0, 0.15):
        wheel.later(delay, lambda due=delay: calls.append((due, loop.time() - began)))
    wheel.later(0.12, lambda: 1 / 0)
    wheel.later(0.4, done.set)
    async with asyncio.timeout(20):
        await done.wait()
    assert [due for due, _ in calls] == [0.0, 0.1, 0.15, 0.2, 0.3]
    assert all(at >= due for due, at in calls)


async def test_a_thousand_calls_due_at_once_leave_turns_to_others() -> None:
    wheel, done, turns = Wheel(), asyncio.Event(), 0
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        if count == 1_000:
            done.set()

    for _ in range(1_000):
        wheel.later(0.01, call)
    while not done.is_set():
        await asyncio.sleep(0)
        turns += bool(count)
    assert turns >= 3


# --- receipts -------------------------------------------------------------------------------------------------------


def told(tally: Tally) -> list[tuple[str, int, int]]:
    receipts = [json.loads(outgoing.payload) for outgoing in tally.take(1, "t", "u", "d", "e")]
    assert all(outgoing.get("sent_at") is None or outgoing["state"] == "acknowledged" for outgoing in receipts)
    return [(receipt["state"], receipt["after"], receipt["up_to"]) for receipt in receipts]


def test_receipts_are_ranges_each_told_once() -> None:
    tally = Tally(10)
    assert told(tally) == []
    tally.sent = 15
    assert told(tally) == [("sent", 10, 15)]
    tally.acked = 12
    assert told(tally) == [("acknowledged", 10, 12)]
    tally.sent, tally.acked = 20, 18
    assert told(tally) == [("acknowledged", 12, 18), ("sent", 18, 20)]
    tally.acked = 20
    assert told(tally) == [("acknowledged", 18, 20)]
    assert told(tally) == []


def test_what_was_acknowledged_without_a_record_names_no_time_of_sending() -> None:
    tally = Tally(10)
    tally.acked, tally.acked_at = 50, 1_000.0  # the cursor of a `live`
    [receipt] = (json.loads(outgoing.payload) for outgoing in tally.take(1, "t", "u", "d", "e"))
    assert (receipt["up_to"], receipt.get("sent_at")) == (50, None)


class Told:
    """A session that has one receipt to tell, or a fault."""

    def __init__(self, payload: bytes | None) -> None:
        self.payload = payload

    def take_receipts(self) -> list[Outgoing]:
        if self.payload is None:
            raise ZeroDivisionError
        return [Outgoing("rcpt.0.t.u", self.payload)]


class Store:
    """Where receipts go; it meets a fault with one of them."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []

    async def append(self, subject: str, payload: bytes, budget_seconds: float) -> None:
        if payload == b"fault":
            raise ZeroDivisionError
        self.stored.append(payload)


async def test_a_fault_with_one_receipt_ends_neither_the_task_nor_the_receipts_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.session.receipts.RECEIPT_SECONDS", 0.01)
    store = Store()
    receipts = Receipts(store)  # type: ignore[arg-type]
    receipts.start()
    for payload in (b"one", None, b"fault", b"two"):
        receipts.note(Told(payload))
        async with asyncio.timeout(20):
            while receipts._noted or receipts._queue:
                await asyncio.sleep(0.005)
    receipts.note(Told(None))
    receipts.note(Told(b"three"))
    async with asyncio.timeout(20):
        while len(store.stored) < 3:
            await asyncio.sleep(0.005)
    await receipts.close(1.0)
    assert store.stored == [b"one", b"two", b"three"]


def test_handshakes_of_an_address_are_bounded_and_come_back_with_time() -> None:
    now = [0.0]
    handshakes = Buckets(2, now=lambda: now[0])
    assert [handshakes.take("a") for _ in range(3)] == [True, True, False]
    assert handshakes.take("b")
    now[0] = 30
    assert [handshakes.take("a") for _ in range(2)] == [True, False]
    assert all(Buckets(0).take("a") for _ in range(1_000))
