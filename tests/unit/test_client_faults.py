"""`connect` when the app's own parts fail, when its user or token changes, and when what it says is lost on the way."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from seamark import (
    Backoff,
    Bookmark,
    ClientError,
    Connection,
    ConnectionClosed,
    FileCursor,
    Live,
    MemoryCursor,
    Problem,
    Record,
    Reset,
    State,
    Timing,
    Unread,
    UserChanged,
    connect,
)
from seamark.client.mailbox import Mailbox
from seamark.client.marks import MISSES_MAX, Lost, Marks
from seamark.client.session import Session
from tests.support.gatewaysim import SimGateway, sim_gateway


@pytest.fixture
async def gateway() -> AsyncIterator[SimGateway]:
    async with sim_gateway() as running:
        yield running


def follow(gateway: SimGateway, **options: object) -> Connection:
    options = {
        "token": "t",
        "device": "laptop",
        "cursor": "start",
        "timing": Timing(ack_seconds=0.02),
        "backoff": Backoff(first_seconds=0.01, max_seconds=0.05),
        **options,
    }
    return connect(gateway.url, **options)  # type: ignore[arg-type]


# --- the store ------------------------------------------------------------------------------------------------------


async def test_nothing_put_after_the_end_keeps_its_error_from_being_reached() -> None:
    box: Mailbox[int] = Mailbox(items_max=2, bytes_max=10)
    await box.put(1)
    await box.put(2)
    blocked = asyncio.create_task(box.put(3), name="put")
    await asyncio.sleep(0)
    box.end(ValueError("over"))
    async with asyncio.timeout(60):
        await blocked
        await box.put(4)
    assert [await box.get(), await box.get()] == [1, 2]
    with pytest.raises(ValueError, match="over"):
        await box.get()


async def test_an_app_learns_that_its_store_fails_also_while_records_never_cease(gateway: SimGateway) -> None:
    class Full(MemoryCursor):
        async def save(self, bookmark: Bookmark) -> None:
            raise OSError("disk full")

    async def publish() -> None:
        while True:
            await gateway.publish({})
            await asyncio.sleep(0)

    async def handle() -> None:
        async with asyncio.timeout(30):
            async for _ in records:
                await asyncio.sleep(0.001)

    publishing = asyncio.create_task(publish(), name="publish")
    records = follow(gateway, store=Full())
    try:
        with pytest.raises(OSError, match="disk full"):
            await handle()
        assert records.state is State.CLOSED
        await gateway.until(lambda: not gateway.sessions)
    finally:
        publishing.cancel()
        with pytest.raises(OSError, match="disk full"):
            await records.close()


async def test_a_store_that_cannot_be_read_fails_again_at_the_second_try_and_then_works(gateway: SimGateway) -> None:
    class Locked(MemoryCursor):
        tries = 0

        async def load(self) -> Bookmark | None:
            self.tries += 1
            if self.tries < 3:
                raise OSError("locked")
            return await super().load()

    await gateway.publish({})
    records = follow(gateway, store=Locked())
    async with asyncio.timeout(60):
        for _ in range(2):
            with pytest.raises(OSError, match="locked"):
                await anext(records)
        assert (await anext(records)).seq == 1
        await records.close()


async def test_closing_waits_for_a_save_under_way_so_that_the_last_one_stays(
    gateway: SimGateway, tmp_path: Path
) -> None:
    class Slow(FileCursor):
        saving = most = 0
        release = threading.Event()

        def _write(self, bookmark: Bookmark) -> None:
            self.saving += 1
            self.most = max(self.most, self.saving)
            if bookmark.cursor == "e1.1":
                self.release.wait(60)
            super()._write(bookmark)
            self.saving -= 1

    store = Slow(tmp_path / "cursor")
    await gateway.publish({}, {})
    records = follow(gateway, store=store)
    async with asyncio.timeout(60):
        (await anext(records)).ack()
        while not store.saving:
            await asyncio.sleep(0.001)
        (await anext(records)).ack()
        closing = asyncio.create_task(records.close(), name="close")
        done, _ = await asyncio.wait((closing,), timeout=0.2)
        store.release.set()
        await closing
    assert not done, "the connection was closed with a save under way"
    assert store.most == 1
    assert await store.load() == Bookmark("e1.2")


# --- callbacks ------------------------------------------------------------------------------------------------------


async def test_a_callback_that_fails_is_told_in_the_loop_and_leaves_nobody_waiting(gateway: SimGateway) -> None:
    def on_state(state: State) -> None:
        raise ValueError(f"no word for {state.value}")

    records = follow(gateway, on_state=on_state)
    async with asyncio.timeout(60):
        with pytest.raises(ValueError, match="no word for connecting"):
            await anext(records)
        await records.close()


# --- counts ---------------------------------------------------------------------------------------------------------


async def test_an_unread_count_comes_whole(gateway: SimGateway) -> None:
    told = {"count": 1000, "as_of": 9, "more": True, "categories": {"orders": 7}, "stale": False}
    async with asyncio.timeout(60), follow(gateway) as records:
        events = records.events()
        assert isinstance(await anext(events), Live)
        await gateway.sessions[0].send({"op": "unread", **told})
        assert await anext(events) == Unread(1000, 9, more=True, categories={"orders": 7})


async def test_a_reset_replaces_the_count_too(gateway: SimGateway) -> None:
    count = {"count": 4, "as_of": 1, "more": False, "categories": {}, "stale": False}
    gateway.fault = lambda frame: [{**frame, "unread": count} if frame["op"] == "reset" else frame]
    async with asyncio.timeout(60), follow(gateway) as records:
        events = records.events()
        assert isinstance(await anext(events), Live)
        await gateway.sessions[0].send({"op": "unread", **count, "count": 9})
        assert (await anext(events)).count == 9  # type: ignore[union-attr]
        gateway.epoch, gateway.log = "e2", []
        await gateway.cut()
        while not isinstance(await anext(events), Reset):
            pass
        assert records.unread == Unread(4, 1)


async def test_a_reset_whose_callback_failed_is_not_done_and_comes_again(gateway: SimGateway) -> None:
    calls = 0

    async def on_reset(reset: Reset) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("disk full")

    store = MemoryCursor()
    async with asyncio.timeout(60), follow(gateway, cursor=None, store=store, on_reset=on_reset) as records:
        events = records.events()
        with pytest.raises(OSError, match="disk full"):
            await anext(events)
        assert (gateway.of("ack"), store.cursor) == ([], None)
        assert isinstance(await anext(records.events()), Reset)
        assert isinstance(await anext(records.events()), Live)
        await gateway.until(lambda: bool(gateway.of("ack")))
    assert calls == 2


async def test_a_callback_that_fails_at_the_end_leaves_no_task_behind(gateway: SimGateway) -> None:
    def on_state(state: State) -> None:
        if state is State.CLOSED:
            raise ValueError("mine")

    before = asyncio.all_tasks()
    async with asyncio.timeout(60):
        records = follow(gateway, on_state=on_state)
        await records.start()
        await gateway.until(lambda: bool(gateway.sessions))
        with pytest.raises(ValueError, match="mine"):
            await records.close()
        await gateway.until(lambda: not gateway.sessions)
    assert {task for task in asyncio.all_tasks() - before if task.get_name().startswith("seamark")} == set()


async def test_a_connection_that_is_closed_while_its_store_is_read_begins_nothing(gateway: SimGateway) -> None:
    class Slow(MemoryCursor):
        def __init__(self) -> None:
            super().__init__()
            self.asked, self.answer = asyncio.Event(), asyncio.Event()

        async def load(self) -> Bookmark | None:
            self.asked.set()
            await self.answer.wait()
            return None

    store = Slow()
    records = follow(gateway, store=store)
    async with asyncio.timeout(60):
        starting = asyncio.create_task(records.start(), name="start")
        await store.asked.wait()
        await records.close()
        store.answer.set()
        with pytest.raises(ConnectionClosed):
            await starting
    assert not records._tasks
    assert gateway.hellos == []


# --- whose position -------------------------------------------------------------------------------------------------


def jwt(user: str, seconds: float = 600.0, number: int = 0) -> str:
    now = time.time()
    claims = json.dumps({"sub": user, "tenant": "t", "iat": now, "exp": now + seconds, "n": number}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).rstrip(b'=').decode()}.s"


async def test_a_bookmark_is_used_by_its_own_user_only_and_replaced_by_the_next(
    gateway: SimGateway, tmp_path: Path
) -> None:
    await gateway.publish({}, {})
    path = tmp_path / "cursor"
    async with asyncio.timeout(60):
        async with follow(gateway, token=jwt("alice"), store=FileCursor(path)) as records:
            (await anext(records)).ack()
            assert records.bookmark == Bookmark("e1.1", "t", "alice")
        assert await FileCursor(path).load() == Bookmark("e1.1", "t", "alice")
        async with follow(gateway, token=jwt("alice"), store=FileCursor(path)) as records:
            assert (await anext(records)).seq == 2
        async with follow(gateway, token=jwt("bob"), cursor=None, store=FileCursor(path)) as records:
            assert isinstance(await anext(records.events()), Reset)
            assert "cursor" not in gateway.hellos[-1]
            await anext(records.events())
        assert await FileCursor(path).load() == Bookmark("e1.2", "t", "bob")


@pytest.mark.parametrize("when", ["reconnecting", "refreshing"])
async def test_a_connection_ends_when_its_token_becomes_another_users(gateway: SimGateway, when: str) -> None:
    seconds = 2.0 if when == "refreshing" else 5.0  # what has so little left is asked for again
    tokens = iter([jwt("alice", seconds), *(jwt("bob", 600, number) for number in range(9))])
    async with asyncio.timeout(60), follow(gateway, token=lambda: next(tokens)) as records:
        await gateway.until(lambda: bool(gateway.sessions))
        if when == "reconnecting":
            await gateway.cut()
        with pytest.raises(UserChanged, match="another user"):
            await anext(records)
    assert len(gateway.hellos) == 1
    assert gateway.of("refresh") == []


async def test_an_app_without_state_begins_with_a_snapshot_and_goes_on_from_memory(gateway: SimGateway) -> None:
    await gateway.publish({}, {})
    for _ in range(2):
        async with asyncio.timeout(60), follow(gateway, cursor=None, snapshot=True) as records:
            events = records.events()
            reset = await anext(events)
            while not isinstance(reset, Reset):
                reset = await anext(events)
            assert (reset.reason, [row["seq"] for row in reset.inbox]) == ("snapshot", [2, 1])
            assert gateway.hellos[-1]["snapshot"] is True
            await gateway.cut()
            await gateway.until(lambda: gateway.hellos[-1].get("cursor") == "e1.2")
            assert "snapshot" not in gateway.hellos[-1]
    with pytest.raises(ValueError, match="snapshot"):
        follow(gateway, snapshot=True)


# --- tokens ---------------------------------------------------------------------------------------------------------


async def test_reconnecting_does_not_ask_for_a_token_that_is_there(gateway: SimGateway) -> None:
    asked = 0

    def source() -> str:
        nonlocal asked
        asked += 1
        return jwt("alice", 600, asked)

    async with asyncio.timeout(60), follow(gateway, token=source):
        for number in range(1, 4):
            await gateway.until(lambda: len(gateway.sessions) == 1)
            await gateway.cut()
            await gateway.until(lambda seen=number + 1: len(gateway.hellos) == seen)
    assert asked == 1


async def test_a_good_token_survives_a_gateway_that_was_slow(gateway: SimGateway) -> None:
    gateway.answers = [4401, 4499, 401]
    async with asyncio.timeout(60), follow(gateway, token="static"):
        await gateway.until(lambda: bool(gateway.sessions))
    assert {hello["token"] for hello in gateway.hellos} == {"static"}


async def test_a_handshake_that_something_else_refuses_says_nothing_of_the_token(gateway: SimGateway) -> None:
    gateway.answers = [401] * 5
    async with asyncio.timeout(60), follow(gateway, token="static"):
        await gateway.until(lambda: bool(gateway.sessions))


# --- marks ----------------------------------------------------------------------------------------------------------


async def test_a_mark_written_into_a_dying_socket_is_said_again_until_the_log_shows_it(gateway: SimGateway) -> None:
    gateway.stores_reads = False
    await gateway.publish({}, {})
    async with asyncio.timeout(60), follow(gateway) as records:
        await live(records)
        await records.read(ids=["r1"])
        await records.read(up_to=place("e1.2"))
        await records.read(up_to=place("e1.1"))
        await gateway.until(lambda: len(gateway.of("read")) == 2)
        gateway.stores_reads = True
        gateway.said.clear()
        await gateway.cut()
        await gateway.until(lambda: len(gateway.of("read")) == 2)
        assert gateway.of("read") == [{"op": "read", "up_to": "e1.2"}, {"op": "read", "ids": ["r1"]}]
        await until(lambda: not records._uplink.marks)
        await gateway.cut()
        await gateway.until(lambda: len(gateway.hellos) == 3)
        await live(records)
    assert len(gateway.of("read")) == 2


async def test_a_mark_that_was_refused_for_now_is_said_again_and_one_never_shown_is_given_up(
    gateway: SimGateway,
) -> None:
    gateway.stores_reads = False
    timing = Timing(ack_seconds=0.02, mark_seconds=0.1)
    async with asyncio.timeout(60), follow(gateway, timing=timing) as records:
        await live(records)
        await records.read(ids=["no-such-record"])
        for number in range(1, 9):
            await gateway.until(lambda said=number: len(gateway.of("read")) >= said)
            await gateway.refuse_last("read", "unavailable")
        assert len(records._uplink.marks) == 1
        problems = []
        async for item in records.events():
            if isinstance(item, Problem):
                problems.append(item)
                if item.code == "mark_lost":
                    break
    assert {problem.code for problem in problems[:-1]} == {"unavailable"}
    assert problems[-1].ids == ["no-such-record"]


async def test_a_mark_beyond_what_a_session_was_sent_waits_and_one_of_another_log_is_given_up(
    gateway: SimGateway,
) -> None:
    await gateway.publish({})
    async with asyncio.timeout(60), follow(gateway) as records:
        await live(records)
        await records.read(up_to=place("e1.2"))  # another process may be ahead: said now, it would be a bad frame
        assert gateway.of("read") == []
        await gateway.publish({})
        await gateway.cut()
        await gateway.until(lambda: gateway.of("read") == [{"op": "read", "up_to": "e1.2"}])
        await until(lambda: not records._uplink.marks)
        await records.read(up_to=place("e7.1"))
        async for item in records.events():
            if isinstance(item, Problem) and item.code != "stale_cursor":
                assert (item.code, item.up_to) == ("mark_lost", "e7.1")
                break


async def test_an_app_that_marks_record_after_record_does_not_flood_the_gateway(gateway: SimGateway) -> None:
    async with asyncio.timeout(60), follow(gateway) as records:
        await live(records)
        for number in range(700):
            await records.read(ids=[f"r{number}"])
        await until(lambda: not records._uplink.marks)
        assert len(gateway.of("read")) <= 5
        await records.read(ids=["first"])
        await records.read(ids=["last"])
    await gateway.until(lambda: "last" in gateway.of("read")[-1]["ids"])  # closing says what waits
    assert len(gateway.hellos) == 1


async def test_a_mark_never_shown_is_given_up_however_many_frames_were_refused_before() -> None:
    marks = Marks()
    marks.add(["a"])
    marks.take(None)
    for _ in range(40):
        marks.refused("read-1")
    lost = []
    for _ in range(2 * MISSES_MAX + 1):
        lost.append(marks.tick())
        marks.take(None)
    assert Lost(["a"]) in lost


async def test_whoever_gives_up_waiting_for_the_end_leaves_no_task_behind(
    gateway: SimGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = follow(gateway)
    await records.start()
    await live(records)
    monkeypatch.setattr(Session, "send", lambda *_: asyncio.sleep(60))  # a dead way takes nothing more
    await records.read(ids=["r1"])
    records._uplink.ack(0, "e1.0")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(records.close(), 0.05)
    assert all(task.done() for task in records._tasks)
    assert records.state is State.CLOSED


async def test_what_is_no_id_is_refused_where_it_is_marked_and_does_not_cost_the_session(gateway: SimGateway) -> None:
    async with asyncio.timeout(60), follow(gateway) as records:
        await live(records)
        for wrong in ("", "x" * 129, "a b", "é", None):
            with pytest.raises(ValueError, match="no id"):
                await records.read(ids=[wrong])  # type: ignore[list-item]
        with pytest.raises(ClientError, match="1000 ids"):
            await records.read(ids=[f"r{number}" for number in range(1001)])
        assert len(records._uplink.marks) == 0


async def test_marks_that_were_never_said_are_told_of_at_the_end(
    gateway: SimGateway, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(60), follow(gateway) as records:
        await live(records)
        gateway.answers = [503] * 10_000
        await gateway.cut()
        await until(lambda: records.state is State.WAITING)
        await records.read(ids=["r1", "r2"])
    assert "2 read marks were never said" in caplog.text


def place(cursor: str) -> Record:
    """A record that another connection was given."""
    return Record(int(cursor.partition(".")[2]), 0, cursor, b"{}")


async def live(records: Connection) -> None:
    await until(lambda: records.state is State.LIVE)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll for what no event tells."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
