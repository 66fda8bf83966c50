"""Reading a part of a stream once: all of it, whatever happens to the connection, and nothing is left behind."""

import asyncio

import pytest

from engine.broker.jetstream import Broker
from engine.errors import ApiError, TopologyError, Unanswered
from ops.dev.servers import NatsServer
from projections import replay as module
from projections.replay import replay
from tests.support.logs import connected, eventually

EVENTS = 1000
BATCH = 100
"""Far more than one batch, also where pulls are answered in parts, of which a few are on order all the time."""


async def filled(url: str) -> int:
    async with connected(url) as broker:
        config = {"name": "S", "subjects": ["s.>"], "storage": "file", "allow_direct": True}
        await broker.api("STREAM.CREATE.S", config)
        for number in range(EVENTS):
            broker.publish(f"s.{number % 3}", b"%d" % number)
        await broker.flush()
        await eventually(lambda: stored(url))
        return (await broker.stream("S")).last_seq


async def stored(url: str) -> bool:
    async with connected(url) as broker:
        return (await broker.stream("S")).last_seq == EVENTS


async def test_a_connection_that_is_lost_and_comes_back_costs_no_message_and_leaves_no_subscription(
    nats_server: NatsServer, monkeypatch
) -> None:
    monkeypatch.setattr(module, "BATCH", BATCH)
    await filled(nats_server.url)
    async with connected(nats_server.url) as broker:
        before, seen, kills = set(broker.nc._subs), [], 0
        async for batch in replay(broker, "S", "s.>", 1, EVENTS):
            seen += [one.seq for one in batch]
            if kills < 2 and len(seen) >= (BATCH, EVENTS // 2)[kills]:
                kills += 1
                nats_server.kill()
                await eventually(lambda: not broker.connected)
                nats_server.start()
                await eventually(lambda: broker.connected)
        assert kills == 2
        assert seen == list(range(1, EVENTS + 1))
        assert set(broker.nc._subs) == before


async def test_reading_that_ends_while_disconnected_leaves_no_subscription(
    nats_server: NatsServer, monkeypatch
) -> None:
    monkeypatch.setattr(module, "BATCH", BATCH)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.0)
    await filled(nats_server.url)
    async with connected(nats_server.url) as broker:
        before = set(broker.nc._subs)

        async def read() -> None:
            async for _ in replay(broker, "S", "s.>", 1, EVENTS):
                nats_server.kill()
                await eventually(lambda: not broker.connected)

        with pytest.raises(Unanswered):
            await read()
        assert set(broker.nc._subs) == before


async def test_an_outage_longer_than_many_tries_is_outlived_and_reading_goes_on_where_it_was(
    nats_server: NatsServer, monkeypatch
) -> None:
    monkeypatch.setattr(module, "BATCH", BATCH)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(module, "PAUSE_SECONDS_MAX", 0.1)
    tries: list[str] = []

    class Counted(module._Head):
        def __init__(self, broker: Broker, stream: str, subject: str) -> None:
            tries.append(stream)
            super().__init__(broker, stream, subject)

    monkeypatch.setattr(module, "_Head", Counted)
    await filled(nats_server.url)
    async with connected(nats_server.url) as broker:
        seen: list[int] = []
        back: asyncio.Task[None] | None = None

        async def return_later() -> None:
            already = len(tries)
            await eventually(lambda: len(tries) >= already + 20)
            nats_server.start()

        async for batch in replay(broker, "S", "s.>", 1, EVENTS):
            seen += [one.seq for one in batch]
            if back is None and len(seen) >= EVENTS // 5:
                nats_server.kill()
                await eventually(lambda: not broker.connected)
                back = asyncio.create_task(return_later())
        assert back is not None
        await back
        assert seen == list(range(1, EVENTS + 1))


async def test_marks_between_records_are_passed_over(nats_server: NatsServer, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH", BATCH)
    async with connected(nats_server.url) as broker:
        await broker.api("STREAM.CREATE.LOG-0", {"name": "LOG-0", "subjects": ["log.0.*.*", "mark.0.*"]})
        records = []
        for number in range(EVENTS // 4):
            records.append((await broker.append(f"log.0.acme.user-{number % 9}", b"a record")).seq)
            for _ in range(number % 3):
                await broker.append("mark.0.0", b"a mark")
        found = [one async for batch in replay(broker, "LOG-0", "log.0.>", 1, records[-1]) for one in batch]
        assert [one.seq for one in found] == records
        assert {one.payload for one in found} == {b"a record"}


async def test_what_the_broker_refuses_is_raised_at_once(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        with pytest.raises(ApiError, match="stream not found"):
            await anext(replay(broker, "S", "s.>", 1, 5))


async def test_reading_ends_when_age_has_taken_what_was_still_to_come(nats_server: NatsServer, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH", BATCH)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)
    await filled(nats_server.url)
    async with connected(nats_server.url) as broker:
        seen: list[int] = []
        async for batch in replay(broker, "S", "s.>", 1, EVENTS):
            if not seen:
                await broker.api("STREAM.PURGE.S")
            seen += [one.seq for one in batch]
        # What was on its way at that moment comes, in batches of any size: a pull may be answered in parts.
        assert seen == list(range(1, len(seen) + 1))
        assert 0 < len(seen) < EVENTS


async def test_a_stream_that_was_made_anew_meanwhile_is_not_taken_for_the_same(
    nats_server: NatsServer, monkeypatch
) -> None:
    monkeypatch.setattr(module, "BATCH", BATCH)
    await filled(nats_server.url)
    async with connected(nats_server.url) as broker:

        async def read() -> None:
            async for _ in replay(broker, "S", "s.>", 1, EVENTS):
                await broker.api("STREAM.DELETE.S")
                await broker.api("STREAM.CREATE.S", {"name": "S", "subjects": ["s.>"], "storage": "file"})

        with pytest.raises(TopologyError, match="made anew"):
            await read()
