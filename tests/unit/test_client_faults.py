"""`connect` when the app's own parts fail: its store, its callbacks; and what it is told of counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from seamark import FileCursor, Live, MemoryCursor, Reset, Unread, connect
from seamark.client import Backoff, Connection, State, Timing
from seamark.client.mailbox import Mailbox
from seamark.client.token import TokenSource
from seamark.client.uplink import READ_IDS_WAITING_MAX, Uplink
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
    async with asyncio.timeout(3):
        await blocked
        await box.put(4)
    assert [await box.get(), await box.get()] == [1, 2]
    with pytest.raises(ValueError, match="over"):
        await box.get()


async def test_an_app_learns_that_its_store_fails_also_while_records_never_cease(gateway: SimGateway) -> None:
    class Full(MemoryCursor):
        async def save(self, cursor: str) -> None:
            raise OSError("disk full")

    async def publish() -> None:
        while True:
            await gateway.publish({})
            await asyncio.sleep(0)

    async def handle() -> None:
        async with asyncio.timeout(3):
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

        async def load(self) -> str | None:
            self.tries += 1
            if self.tries < 3:
                raise OSError("locked")
            return await super().load()

    await gateway.publish({})
    records = follow(gateway, store=Locked())
    async with asyncio.timeout(5):
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

        def _write(self, cursor: str) -> None:
            self.saving += 1
            self.most = max(self.most, self.saving)
            time.sleep(0.3 if cursor == "e1.1" else 0)
            super()._write(cursor)
            self.saving -= 1

    store = Slow(tmp_path / "cursor")
    await gateway.publish({}, {})
    records = follow(gateway, store=store)
    async with asyncio.timeout(5):
        (await anext(records)).ack()
        while not store.saving:
            await asyncio.sleep(0.001)
        (await anext(records)).ack()
        await records.close()
    await asyncio.sleep(0.5)  # a thread that was left alone would be done by now
    assert store.most == 1
    assert await store.load() == "e1.2"


# --- callbacks ------------------------------------------------------------------------------------------------------


async def test_a_callback_that_fails_is_told_in_the_loop_and_leaves_nobody_waiting(gateway: SimGateway) -> None:
    def on_state(state: State) -> None:
        raise ValueError(f"no word for {state.value}")

    records = follow(gateway, on_state=on_state)
    async with asyncio.timeout(3):
        with pytest.raises(ValueError, match="no word for connecting"):
            await anext(records)
        await records.close()


# --- counts ---------------------------------------------------------------------------------------------------------


async def test_an_unread_count_comes_whole(gateway: SimGateway) -> None:
    told = {"count": 1000, "as_of": 9, "more": True, "categories": {"orders": 7}, "stale": False}
    async with asyncio.timeout(5), follow(gateway) as records:
        events = records.events()
        assert isinstance(await anext(events), Live)
        await gateway.sessions[0].send({"op": "unread", **told})
        assert await anext(events) == Unread(1000, 9, more=True, categories={"orders": 7})


async def test_a_reset_replaces_the_count_too(gateway: SimGateway) -> None:
    count = {"count": 4, "as_of": 1, "more": False, "categories": {}, "stale": False}
    gateway.fault = lambda frame: [{**frame, "unread": count} if frame["op"] == "reset" else frame]
    async with asyncio.timeout(5), follow(gateway) as records:
        events = records.events()
        assert isinstance(await anext(events), Live)
        await gateway.sessions[0].send({"op": "unread", **count, "count": 9})
        assert (await anext(events)).count == 9  # type: ignore[union-attr]
        gateway.epoch, gateway.log = "e2", []
        await gateway.cut()
        while not isinstance(await anext(events), Reset):
            pass
        assert records.unread == Unread(4, 1)


# --- marks ----------------------------------------------------------------------------------------------------------


async def test_marks_that_cannot_be_said_again_wait_on_whatever_was_marked_meanwhile() -> None:
    class Dying:
        async def send(self, text: str) -> bool:
            if "up_to" in text:
                await uplink.read_ids(["later"])  # the app, while the first frame is stuck
            return False

    uplink = Uplink(TokenSource("t"), Timing())
    await uplink.read_ids([f"r{number}" for number in range(READ_IDS_WAITING_MAX)])
    await uplink.read_up_to("e1.1")
    uplink.begins(Dying())  # type: ignore[arg-type]
    await uplink.stands()
    assert len(uplink._waiting_ids) == READ_IDS_WAITING_MAX + 1
