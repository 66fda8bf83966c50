"""`connect` against a simulated gateway: what the way and the gateway can do to a device, on request."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path

import pytest

from seamark import (
    Backoff,
    Bookmark,
    ClientError,
    Connection,
    FileCursor,
    Live,
    MemoryCursor,
    NotAuthenticated,
    Problem,
    Record,
    Reset,
    State,
    Timing,
    TooManySessions,
    connect,
)
from tests.support.gatewaysim import SimGateway, sim_gateway

FAST = Timing(ack_seconds=0.02)


@pytest.fixture
async def gateway():
    async with sim_gateway() as running:
        yield running


def follow(gateway: SimGateway, **options: object) -> Connection:
    options.setdefault("token", "t")
    options.setdefault("device", "laptop")
    options.setdefault("timing", FAST)
    options.setdefault("backoff", Backoff(first_seconds=0.01, max_seconds=0.05))
    return connect(gateway.url, **options)


async def take(records: Connection, number: int) -> list[int]:
    """The sequences of the next `number` records, each done."""
    got = []
    async with asyncio.timeout(60):
        while len(got) < number:
            record = await anext(records)
            got.append(record.seq)
            record.ack()
    return got


async def test_records_come_in_order_and_after_a_cut_each_once(gateway):
    await gateway.publish({}, {}, {}, gap=3)
    async with follow(gateway, cursor="start") as records:
        assert await take(records, 2) == [3, 6]
        await gateway.cut()
        await gateway.publish({}, {})
        assert await take(records, 3) == [9, 10, 11]
        assert gateway.hellos[-1]["cursor"] == "e1.9"
        assert records.reconnects == 1


async def test_what_was_received_but_not_taken_survives_a_reconnect_without_doubling(gateway):
    await gateway.publish({}, {}, {})
    async with follow(gateway, cursor="start") as records:
        await gateway.until(lambda: bool(gateway.sessions))
        await until(lambda: records.position == "e1.3")
        await gateway.cut()
        await gateway.until(lambda: len(gateway.hellos) == 2)
        assert gateway.hellos[-1]["cursor"] == "e1.3"
        await gateway.publish({})
        assert await take(records, 4) == [1, 2, 3, 4]


async def until(condition, seconds: float = 60.0):
    """Poll for what no event tells."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.005)


async def test_a_record_is_stored_and_acknowledged_only_when_the_app_comes_back(gateway):
    await gateway.publish({}, {})
    store = MemoryCursor()
    async with follow(gateway, cursor="start", store=store) as records:
        assert (await anext(records)).seq == 1
        await gateway.publish({})
        await until(lambda: records.position == "e1.3")
        assert store.cursor is None
        assert gateway.of("ack") == []
        assert (await anext(records)).seq == 2
        await gateway.until(lambda: gateway.of("ack") == [{"op": "ack", "cursor": "e1.1"}])
        await until(lambda: store.cursor == "e1.1")
    assert store.cursor == "e1.1"


async def test_an_app_that_dies_in_the_middle_of_a_record_gets_it_again(gateway, tmp_path: Path):
    await gateway.publish({}, {}, {})
    path = tmp_path / "cursor"

    async def die_at_the_second() -> None:
        async with follow(gateway, cursor="start", store=FileCursor(path)) as records:
            async for record in records:
                _ = 1 / (2 - record.seq)

    with pytest.raises(ZeroDivisionError):
        await die_at_the_second()
    async with follow(gateway, cursor="start", store=FileCursor(path)) as records:
        assert await take(records, 2) == [2, 3]


async def test_with_manual_acks_coming_back_is_not_enough(gateway):
    await gateway.publish({}, {}, {})
    store = MemoryCursor()
    async with follow(gateway, cursor="start", store=store, auto_ack=False) as records:
        first, second = await anext(records), await anext(records)
        await anext(records)
        assert store.cursor is None
        second.ack()
        first.ack()
        await gateway.until(lambda: gateway.of("ack") == [{"op": "ack", "cursor": "e1.2"}])
    assert store.cursor == "e1.2"


async def test_the_position_of_an_idle_log_is_stored_too(gateway):
    store = MemoryCursor()
    await gateway.publish({})
    async with follow(gateway, cursor="start", store=store) as records:
        events = records.events()
        assert isinstance(await anext(events), Record)
        assert isinstance(await anext(events), Live)
        for session in gateway.sessions:
            await session.send({"op": "live", **gateway.at(500)})
            session.sent = 500
        assert (await anext(events)).cursor == "e1.500"
        await until(lambda: store.cursor == "e1.500")
        gateway.log.append((501, {}))
        await gateway.sessions[0].record(501, {"id": "x"})
        assert (await anext(events)).prev == 500


@pytest.mark.parametrize("fault", ["lose", "double", "swap"])
async def test_a_lost_doubled_or_overtaken_frame_costs_a_reconnect_at_most(gateway, fault):
    held: list[dict] = []

    def spoil(frame: dict) -> list[dict]:
        if frame["op"] != "record" or frame["seq"] not in (3, 4) or len(gateway.hellos) > 1:
            return [frame]
        if fault == "lose":
            return [frame] if frame["seq"] == 4 else []
        if fault == "double":
            return [frame, frame]
        if frame["seq"] == 3:
            held.append(frame)
            return []
        return [frame, *held]

    gateway.fault = spoil
    await gateway.publish(*({} for _ in range(6)))
    async with follow(gateway, cursor="start") as records:
        assert await take(records, 6) == [1, 2, 3, 4, 5, 6]
    assert len(gateway.hellos) == (1 if fault == "double" else 2)


async def test_a_reset_reaches_the_app_in_its_place_and_old_cursors_are_not_acknowledged(gateway):
    await gateway.publish({}, {})
    seen: list[object] = []
    async with follow(gateway, cursor="start", on_reset=lambda reset: seen.append(reset.reason)) as records:
        record = await anext(records)
        await until(lambda: records.position == "e1.2")
        gateway.epoch, gateway.log = "e2", []
        await gateway.cut()
        await gateway.until(lambda: len(gateway.hellos) == 2)
        await gateway.publish({}, {}, {})
        assert record.seq == 1
        assert await take(records, 1) == [2]
        assert seen == []
        assert await take(records, 3) == [1, 2, 3]
        assert seen == ["epoch"]
        await gateway.until(lambda: bool(gateway.of("ack")) and gateway.of("ack")[-1]["cursor"] == "e2.3")
    assert all(ack["cursor"].startswith("e2.") for ack in gateway.of("ack"))


async def test_without_cursor_and_unknown_device_events_begin_with_the_reset(gateway):
    async with follow(gateway) as records:
        events = records.events()
        reset = await anext(events)
        assert isinstance(reset, Reset)
        assert (reset.reason, reset.inbox, reset.unread) == ("new", [], None)
        assert isinstance(await anext(events), Live)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (4400, ClientError),
        (4403, ClientError),
        (4409, TooManySessions),
        (4413, ClientError),
    ],
)
async def test_codes_that_say_stop_end_the_iteration_with_a_clear_error_after_what_had_come(gateway, code, error):
    await gateway.publish({})
    async with follow(gateway, cursor="start") as records:
        await gateway.until(lambda: bool(gateway.sessions))
        await until(lambda: records.position == "e1.1")
        await gateway.cut(code, "because")
        await until(lambda: records.state is State.CLOSED)
        assert (await anext(records)).seq == 1
        with pytest.raises(error, match=str(code)):
            await anext(records)
    assert len(gateway.hellos) == 1


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 4408, 4499])
async def test_codes_that_say_reconnect_do(gateway, code):
    async with follow(gateway, cursor="start"):
        await gateway.until(lambda: bool(gateway.sessions))
        await gateway.cut(code)
        await gateway.until(lambda: len(gateway.hellos) == 2)


async def test_refused_handshakes_are_retried_or_final_by_their_status(gateway):
    gateway.answers = [503, 502, 500]
    async with follow(gateway, cursor="start"):
        await gateway.until(lambda: bool(gateway.sessions))
    gateway.answers = [403]
    async with follow(gateway) as records:
        with pytest.raises(ClientError, match="4403"):
            await anext(records)


async def test_bye_is_obeyed(gateway):
    async with follow(gateway, cursor="start") as records:
        await gateway.until(lambda: bool(gateway.sessions))
        await gateway.sessions[0].send({"op": "bye", "retry_after_ms": 300})
        began = time.monotonic()
        await gateway.cut(1012, "restarting")
        await gateway.until(lambda: len(gateway.hellos) == 2)
        assert time.monotonic() - began >= 0.3
        assert records.last_end is not None
        assert records.last_end.retry_after_seconds == 0.3


async def test_a_refused_token_is_replaced_by_the_next_one(gateway):
    gateway.refused_tokens = {"old"}
    tokens = iter(["old", "new"])
    async with follow(gateway, token=lambda: next(tokens), cursor="start"):
        await gateway.until(lambda: bool(gateway.sessions))
    assert [hello["token"] for hello in gateway.hellos] == ["old", "new"]


async def test_a_token_refused_three_times_in_a_row_ends_the_iteration(gateway):
    gateway.refused_tokens = {"t"}
    async with follow(gateway, cursor="start") as records:
        with pytest.raises(NotAuthenticated, match="4401"):
            await anext(records)
    assert len(gateway.hellos) == 3


async def test_a_token_service_that_is_away_is_asked_again(gateway):
    calls = 0

    async def token() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise ConnectionError("identity provider is away")
        return "t"

    async with follow(gateway, token=token, cursor="start"):
        await gateway.until(lambda: bool(gateway.sessions))
    assert calls == 3


def jwt(seconds: float, number: int) -> str:
    now = time.time()
    claims = json.dumps({"sub": "alice", "iat": now, "exp": now + seconds, "n": number}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).rstrip(b'=').decode()}.s"


async def test_the_session_is_kept_by_refreshing_before_the_token_expires(gateway):
    count = 0

    def token() -> str:
        nonlocal count
        count += 1
        return jwt(2.0, count)

    async with follow(gateway, token=token, cursor="start"):
        await gateway.until(lambda: bool(gateway.of("refresh")))
    assert expiry(gateway.of("refresh")[0]["token"]) > expiry(gateway.hellos[0]["token"])
    assert len(gateway.hellos) == 1


def expiry(token: str) -> float:
    body = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["exp"]


async def test_a_way_that_fell_silent_is_replaced(gateway):
    gateway.fault = lambda frame: [] if frame["op"] == "pong" else [frame]
    timing = Timing(ping_seconds=0.05, silence_seconds=0.2, ack_seconds=0.02)
    async with follow(gateway, cursor="start", timing=timing):
        await gateway.until(lambda: len(gateway.hellos) >= 2)


async def test_an_app_that_does_not_read_is_no_silence(gateway):
    timing = Timing(ping_seconds=0.1, silence_seconds=1.0, ack_seconds=0.02)
    await gateway.publish(*({"data": "x" * 100_000} for _ in range(100)))
    for _ in range(3):
        gateway.hellos.clear()
        gateway.said.clear()
        async with follow(gateway, cursor="start", timing=timing) as records:
            await gateway.until(lambda: len(gateway.of("ping")) >= 12)
            assert await take(records, 100) == list(range(1, 101))
        if len(gateway.hellos) == 1:
            return  # else this machine may have stood still, once
    pytest.fail("it has connected again, three times")


async def test_acks_are_coalesced_and_the_last_one_goes_out_at_close(gateway):
    await gateway.publish(*({} for _ in range(500)))
    async with follow(gateway, cursor="start", timing=Timing(ack_seconds=60.0)) as records:
        await take(records, 500)
    await gateway.until(lambda: not gateway.sessions)
    acks = gateway.of("ack")
    assert acks[-1]["cursor"] == "e1.500"
    assert len(acks) <= 2


async def test_an_ack_lost_with_its_session_is_said_again_on_the_next(gateway):
    await gateway.publish({}, {})
    async with follow(gateway, cursor="start") as records:
        await take(records, 2)
        await gateway.until(lambda: gateway.of("ack")[-1:] == [{"op": "ack", "cursor": "e1.2"}])
        gateway.said.clear()
        await gateway.cut()
        await gateway.until(lambda: gateway.of("ack") == [{"op": "ack", "cursor": "e1.2"}])


async def test_marks_made_without_a_session_are_said_on_the_next_and_all_means_what_was_seen(gateway):
    await gateway.publish({}, {})
    async with follow(gateway, cursor="start") as records:
        await take(records, 2)
        gateway.answers = [503] * 10_000
        await gateway.cut()
        await until(lambda: records.state is State.WAITING)
        await records.read(ids=["r1", "r2"])
        await records.read(all=True)
        await gateway.publish({})
        gateway.answers.clear()
        await gateway.until(lambda: len(gateway.of("read")) == 2)
    assert gateway.of("read") == [{"op": "read", "up_to": "e1.2"}, {"op": "read", "ids": ["r1", "r2"]}]


async def test_read_takes_exactly_one_of_its_arguments(gateway):
    async with follow(gateway) as records:
        for wrong in ({}, {"ids": ["a"], "all": True}, {"up_to": Live("e1.1", 1), "ids": []}):
            with pytest.raises(ValueError, match="exactly one"):
                await records.read(**wrong)
        with pytest.raises(TypeError, match="Record, Reset or Live"):
            await records.read(up_to="e1.1")


async def test_a_store_that_fails_ends_the_iteration(gateway):
    class Full(MemoryCursor):
        async def save(self, bookmark: Bookmark) -> None:
            raise OSError("disk full")

    await gateway.publish({}, {})
    records = follow(gateway, cursor="start", store=Full())
    with pytest.raises(OSError, match="disk full"):
        await collect(records)
    with pytest.raises(OSError, match="disk full"):
        await records.close()


async def test_states_are_told_in_order(gateway):
    states: list[State] = []
    async with follow(gateway, cursor="start", on_state=states.append):
        await until(lambda: states[-1:] == [State.LIVE])
        await gateway.cut()
        await until(lambda: len(states) > 4 and states[-1] is State.LIVE)
    assert states == [
        State.CONNECTING, State.CATCHING_UP, State.LIVE, State.WAITING,
        State.CONNECTING, State.CATCHING_UP, State.LIVE, State.CLOSED,
    ]  # fmt: skip


async def test_unread_unstored_events_and_problems_reach_the_app(gateway):
    async with follow(gateway, cursor="start") as records:
        events = records.events()
        assert isinstance(await anext(events), Live)
        await gateway.sessions[0].send({"op": "unread", "count": 3, "as_of": 9})
        await gateway.sessions[0].send({"op": "now", "type": "demo.typing", "data": {"who": "bob"}})
        await gateway.sessions[0].send({"op": "invented", "x": 1})
        await gateway.sessions[0].send({"op": "error", "code": "too_many_reads", "detail": "slowly"})
        assert (await anext(events)).count == 3
        assert (await anext(events)).type == "demo.typing"
        assert await anext(events) == Problem("too_many_reads", "slowly")
        assert records.unread is not None
        assert records.unread.count == 3


async def test_closing_ends_a_waiting_iteration(gateway):
    records = follow(gateway, cursor="start")
    await records.start()
    waiting = asyncio.create_task(collect(records), name="waiting")
    await gateway.until(lambda: bool(gateway.sessions))
    await records.close()
    async with asyncio.timeout(60):
        assert await waiting == []


async def collect(records: Connection) -> list[Record]:
    return [record async for record in records]
