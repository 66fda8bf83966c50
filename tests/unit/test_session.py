"""One session without a network: unread counts in their order, and whose fault a late `hello` is."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from engine.cursor import Cursor
from gateway.auth import Claims
from gateway.close_codes import CloseCode
from gateway.counts import unread_frame
from gateway.live import UserLog
from gateway.options import Times
from gateway.port import ResetReason, Snapshot
from gateway.session import Session
from gateway.sessions import Sessions
from gateway.wheel import Wheel


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
    context: Any = SimpleNamespace(wheel=Wheel(), sessions=Sessions(), times=Times(hello_seconds=0.1), **more)
    session = Session(context, window, "ws")
    session._follower = SimpleNamespace(writable=lambda: None)  # type: ignore[assignment]
    return session


def count(number: int, as_of: int) -> dict[str, Any]:
    return {"count": number, "as_of": as_of, "more": False, "categories": {}, "stale": False}


async def test_a_count_that_waited_for_room_is_never_told_after_a_newer_one() -> None:
    window = Window()
    session = session_on(window)
    session.ready(Cursor("e", 1))
    window.has_room = False
    session.unread(unread_frame(count(1, 5)))
    window.has_room = True  # some of it has drained, but not enough yet for the session to be told
    session.unread(unread_frame(count(2, 6)))
    session.writable()
    assert window.counts == [2]


async def test_a_count_that_came_before_ready_is_not_told_after_the_newer_one_in_it() -> None:
    window = Window()
    session = session_on(window)
    session.unread(unread_frame(count(1, 5)))
    session.counted(count(2, 6))
    session.ready(Cursor("e", 1))
    assert window.counts == [2]


async def test_a_count_that_came_before_a_reset_is_told_after_it_only_if_it_is_newer() -> None:
    for waiting, told in ((5, [2, 2]), (7, [2, 2, 1])):
        window = Window()
        session = session_on(window)
        session.unread(unread_frame(count(1, waiting)))
        session._follower.tally = None  # type: ignore[union-attr]
        session.reset(ResetReason.NEW, Snapshot(None, unread=count(2, 6)), Cursor("e", 1))
        assert window.counts == told


class Listener:
    def __init__(self) -> None:
        self.counts: list[int] = []

    def unread(self, frame: bytes) -> None:
        self.counts.append(json.loads(frame)["count"])


async def test_a_change_of_the_count_that_was_lost_reaches_everybody_when_another_session_reads_it() -> None:
    log = UserLog(SimpleNamespace(number=0), "default", "alice")  # type: ignore[arg-type]
    first, second = Listener(), Listener()
    log.followers = [first]  # type: ignore[list-item]
    log.counted(count(1, 5))
    log.followers = [first, second]  # type: ignore[list-item]
    log.counted(count(2, 6))  # what the projector said of it was lost
    assert first.counts == [2]
    log.compare(count(2, 6))
    assert first.counts == [2]


async def test_a_token_that_cannot_be_checked_in_time_is_no_fault_of_the_token() -> None:
    checking = asyncio.Event()

    class Slow:
        async def verify(self, token: str) -> Claims:
            await checking.wait()
            raise AssertionError

    window = Window()
    session = session_on(window, verifier=Slow())
    session._follower = None
    work = session.receive(b'{"op":"hello","token":"t","device":"d"}')
    assert work is not None
    task = asyncio.create_task(work, name="hello")
    async with asyncio.timeout(5):
        while window.closed is None:
            await asyncio.sleep(0.01)
    task.cancel()
    assert (window.closed.code, window.closed.reconnect) == (1011, True)


async def test_who_says_no_hello_is_told_that_it_is_not_authenticated() -> None:
    window = Window()
    session = session_on(window)
    session._follower = None
    async with asyncio.timeout(5):
        while window.closed is None:
            await asyncio.sleep(0.01)
    assert window.closed.code == 4401
