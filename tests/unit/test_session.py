"""One session without a network: unread counts in their order, and whose fault a late `hello` is."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.access.principals import User
from gateway.join.port import FeedCounters, ResetReason, Snapshot
from gateway.log.live import UserLog
from gateway.options import Times
from gateway.session.follower import Follower
from gateway.session.positions import StaleCursor, acknowledged, plainly_acknowledged, read_up_to
from gateway.session.registry import Sessions, one_too_many
from gateway.session.session import Session
from gateway.session.wheel import Wheel
from seamark.protocol.close_codes import CloseCode
from seamark.protocol.cursor import Cursor
from seamark.protocol.errors import BadFrame
from seamark.protocol.frames import Ack, Read, Unread, decode_client_frame, encode, unread_frame


class Window:
    """An outlet that shows what was sent."""

    tells_live = True

    def __init__(self) -> None:
        self.has_room = True
        self.frames: list[dict[str, Any]] = []
        self.closed: CloseCode | None = None

    def room(self) -> bool:
        return self.has_room

    def send(self, frame: bytes, epoch: bytes = b"", seq: int = 0) -> None:
        self.frames.append(json.loads(frame))

    def ping(self) -> bool:
        return True

    def stuck_seconds(self) -> float:
        return 0.0

    def close(self, code: CloseCode, detail: str) -> None:
        self.closed = code

    @property
    def counts(self) -> list[int]:
        """Every count a client was shown, in order."""
        told = [frame["unread"] if frame["op"] in ("ready", "reset") else frame for frame in self.frames]
        return [one["count"] for one in told if one is not None]


def session_on(window: Window, **more: Any) -> Session:
    context: Any = SimpleNamespace(
        wheel=Wheel(), sessions=Sessions(), times=Times(hello_seconds=0.1), recent_traces=None, **more
    )
    return Session(context, window, "ws")


def follower_on(window: Window) -> Follower:
    receipts = SimpleNamespace(add=lambda receipts: None)
    context = SimpleNamespace(counters=FeedCounters(), receipts=receipts, tables=None, recent_traces=None)
    session: Any = SimpleNamespace(context=context, id="s", tenant="default", user="alice", device="d", ended=False)
    partition: Any = SimpleNamespace(number=0, heads=SimpleNamespace(opening=lambda subject, answer: None))
    follower = Follower(session, window, partition, "e.90")
    follower.log = UserLog(0, "default", "alice")
    return follower


def test_a_count_that_waited_for_room_is_never_told_after_a_newer_one() -> None:
    window = Window()
    follower = follower_on(window)
    follower.resumed(Cursor("e", 1))
    window.has_room = False
    follower.unread(unread_frame(Unread(1, 5)))
    window.has_room = True  # some of it has drained, but not enough yet for the session to be told
    follower.unread(unread_frame(Unread(2, 6)))
    follower.writable()
    assert window.counts == [2]


def test_a_count_that_came_before_ready_is_not_told_after_the_newer_one_in_it() -> None:
    window = Window()
    follower = follower_on(window)
    follower.unread(unread_frame(Unread(1, 5)))
    follower._counted(Unread(2, 6))
    follower.resumed(Cursor("e", 1))
    assert window.counts == [2]


def test_a_count_that_came_before_a_reset_is_told_after_it_only_if_it_is_newer() -> None:
    for waiting, told in ((5, [2, 2]), (7, [2, 2, 1])):
        window = Window()
        follower = follower_on(window)
        follower.unread(unread_frame(Unread(1, waiting)))
        follower.reset(ResetReason.NEW, Snapshot(None, unread=Unread(2, 6)), Cursor("e", 1))
        assert window.counts == told


def test_an_acknowledgement_that_crossed_a_reset_counts_for_nothing_that_was_sent_after_it() -> None:
    window = Window()
    follower = follower_on(window)
    assert follower.log is not None
    follower.log.listeners = [follower]
    follower.log.count(unread_frame(Unread(4, 100)))
    follower.resumed(Cursor("e", 90))
    follower._moved(100)
    assert acknowledged("e.95", follower) == 95
    follower.reset(ResetReason.FUTURE, Snapshot(None), Cursor("e", 50))  # the log has gone back
    follower._moved(60)
    assert acknowledged("e.95", follower) is None, "a record that is no more"
    assert acknowledged("e.55", follower) is None, "it may be of the record that was there before"
    follower.log.count(unread_frame(Unread(1, 55)))
    assert window.counts == [4, 1], "a count of the log as it is now counts, though a higher position was told before"
    with pytest.raises(StaleCursor):
        read_up_to(Read(up_to="e.95"), follower)
    with pytest.raises(BadFrame):
        acknowledged("e.101", follower)
    follower._moved(110)
    assert acknowledged("e.105", follower) == 105
    follower.reset(ResetReason.EPOCH, Snapshot(None), Cursor("f", 0))
    follower._moved(3)
    assert acknowledged("e.110", follower) is None
    assert acknowledged("f.2", follower) == 2


@given(
    start=st.sampled_from(
        ['{"op":"ack","cursor":"', '{"cursor":"', '{"op": "ack","cursor":"', '{"op":"ping","cursor":"']
    ),
    epoch=st.sampled_from(["e", "former", "other", ""]),
    seq=st.integers(-1, 30).map(str) | st.sampled_from(["007", "", "1.2", "²", "1" * 20, "٣"]),
    end=st.sampled_from(['"}', '","id":"5"}', '"} ', '","id":"5', '"', '"]']),
    was_reset=st.booleans(),
)
@example('{"op":"ack","cursor":"', "e", "7", '"}', False)
@example('{"op":"ack","cursor":"', "e", "007", '"}', False)
@example('{"op":"ack","cursor":"', "e", "12", '"}', True)
def test_an_ack_that_is_not_decoded_means_what_it_means_when_it_is(
    start: str, epoch: str, seq: str, end: str, was_reset: bool
) -> None:
    follower = follower_on(Window())
    for cursor in (Cursor("former", 3), Cursor("e", 5), *[Cursor("e", 12)] * was_reset):
        follower.reset(ResetReason.NEW, Snapshot(None), cursor)
        follower.sent_max = cursor.seq + 4
    data = f"{start}{epoch}.{seq}{end}".encode()
    plainly = plainly_acknowledged(data, follower)
    if plainly is not None:
        frame = decode_client_frame(data)
        assert isinstance(frame, Ack)
        assert acknowledged(frame.cursor, follower) == plainly
    was_sent = range(10, 17) if was_reset else range(1, 10)
    written_plainly = start.startswith('{"op":"ack",') and epoch == "e" and end == '"}'
    assert (plainly is not None) == (written_plainly and seq in map(str, was_sent))


@pytest.mark.parametrize(
    "sent", [encode(Ack(cursor="e.9")), b'{"op":"ack","cursor":"e.9"}'], ids=["Python", "JavaScript"]
)
def test_acks_as_sdks_write_them_are_not_decoded(sent: bytes) -> None:
    follower = follower_on(Window())
    follower.resumed(Cursor("e", 9))
    assert plainly_acknowledged(sent, follower) == 9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=2, max_size=8))
def test_the_session_that_makes_room_is_of_the_same_device_or_the_one_that_was_silent_for_longest(
    held: list[tuple[str, int]],
) -> None:
    sessions = [SimpleNamespace(device=device, heard_at=heard_at) for device, heard_at in held]
    gone = one_too_many(sessions)  # type: ignore[arg-type]
    *older, newest = sessions
    same = [session for session in older if session.device == newest.device]
    assert gone in older
    assert gone is same[0] if same else gone.heard_at == min(session.heard_at for session in older)


def test_a_count_of_the_former_log_that_waits_is_not_told_after_a_reset_in_mid_session() -> None:
    window = Window()
    follower = follower_on(window)
    follower.resumed(Cursor("e", 1))
    window.has_room = False
    follower.unread(unread_frame(Unread(9, 100)))
    window.has_room = True
    follower.reset(ResetReason.EPOCH, Snapshot(None, unread=Unread(0, 3)), Cursor("f", 3))
    assert window.counts == [0]


class Listener:
    def __init__(self) -> None:
        self.counts: list[int] = []

    def unread(self, frame: bytes) -> None:
        self.counts.append(json.loads(frame)["count"])


async def test_a_change_of_the_count_that_was_lost_reaches_everybody_when_another_session_reads_it() -> None:
    log = UserLog(0, "default", "alice")
    first, second = Listener(), Listener()
    log.listeners = [first]  # type: ignore[list-item]
    log.counted(Unread(1, 5))
    log.listeners = [first, second]  # type: ignore[list-item]
    log.counted(Unread(2, 6))  # what the projector said of it was lost
    assert first.counts == [2]
    log.compare(Unread(2, 6))
    assert first.counts == [2]


async def test_a_token_that_cannot_be_checked_in_time_is_no_fault_of_the_token() -> None:
    checking = asyncio.Event()

    class Slow:
        async def verify(self, token: str) -> User:
            await checking.wait()
            raise AssertionError

    window = Window()
    session = session_on(window, verifier=Slow())
    work = session.receive(b'{"op":"hello","token":"t","device":"d"}')
    assert work is not None
    task = asyncio.create_task(work, name="hello")
    async with asyncio.timeout(20):
        while window.closed is None:
            await asyncio.sleep(0.01)
    task.cancel()
    assert (window.closed.code, window.closed.reconnect) == (1011, True)


async def test_a_client_that_says_no_hello_in_time_may_come_back() -> None:
    window = Window()
    session_on(window)
    async with asyncio.timeout(20):
        while window.closed is None:
            await asyncio.sleep(0.01)
    assert (window.closed.code, window.closed.reconnect) == (4407, True)


def test_a_ping_before_there_is_a_position_is_answered_with_the_first_one() -> None:
    for tell in (
        lambda follower: follower.resumed(Cursor("e", 7)),
        lambda follower: follower.reset(ResetReason.NEW, Snapshot(None), Cursor("e", 7)),
    ):
        window = Window()
        follower = follower_on(window)
        follower.pong()
        assert window.frames == []
        tell(follower)
        assert window.frames[0]["op"] == "ready"
        assert window.frames[-1] == {"op": "pong", "cursor": "e.7", "seq": 7}
