"""Reading a part of a stream once: all of it, whatever happens to the connection, and nothing is left behind."""

import pytest

from engine.errors import Unanswered
from projections import replay as module
from projections.replay import replay
from seamark.dev.servers import NatsServer
from tests.support.logs import connected, eventually

EVENTS = 5000


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
    monkeypatch.setattr(module, "BATCH", 500)
    await filled(nats_server.url)
    async with connected(nats_server.url) as broker:
        before, seen, kills = set(broker.nc._subs), [], 0
        async for batch in replay(broker, "S", "s.>", 1, EVENTS):
            seen += [one.seq for one in batch]
            if kills < 2 and len(seen) >= (500, 2500)[kills]:
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
    monkeypatch.setattr(module, "TRIES", 1)
    await filled(nats_server.url)
    async with connected(nats_server.url) as broker:
        before = set(broker.nc._subs)
        nats_server.kill()
        await eventually(lambda: not broker.connected)
        with pytest.raises(Unanswered):
            async for _ in replay(broker, "S", "s.>", 1, EVENTS):
                pass
        assert set(broker.nc._subs) == before
