"""What a session costs while it is idle, and that nothing of it stays when it is over."""

import asyncio
import contextlib
import gc
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from engine.broker.jetstream import NatsSettings, connect
from engine.topology import server as topology
from gateway.carriers.connection import Connection
from gateway.join.feed import Feed
from gateway.log.live import UserLog
from gateway.options import Times
from gateway.session.follower import _CLOSED, Follower
from gateway.session.outlet import WebSocketOutlet
from gateway.session.receipts import Tally
from gateway.session.session import Session
from ops.dev.servers import NatsServer
from tests.integration.test_events_api import INVALID, post, with_keys
from tests.support.gatewayprocess import GatewayProcess, gateway_process
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually
from tests.support.tokens import SECRET, token

OURS = (Session, Follower, Feed, UserLog, WebSocketOutlet, Tally, Connection, web.WebSocketResponse, web.Request)


async def come_and_go(gateway: TestGateway, count: int) -> None:
    """So many sessions of one user each, joined, sent a record, acknowledged, closed by one side or the other."""
    for number in range(count):
        async with gateway.device(f"user{number}") as device:
            await device.until("live")
            await gateway.append(f"user{number}")
            await device.say("ack", cursor=(await device.records(1))[0]["cursor"])
            if number % 2:
                await device.say("hello", device="again")
                await device.closed()


async def test_a_session_that_is_over_is_released_without_the_garbage_collector(nats_server: NatsServer) -> None:
    # Timers refer to a session until they are due: the longest are those of its `hello` and of its next ping.
    async with gateway_on(nats_server, times=Times(hello_seconds=1.0, ping_seconds=3.0)) as gateway:
        await come_and_go(gateway, 4)
        gc.collect()
        gc.disable()
        try:
            await come_and_go(gateway, 20)

            await all_released(left)
        finally:
            gc.enable()


def left() -> Counter[str]:
    """What there is of sessions and requests in this process, whichever gateway they came to."""
    ours = [thing for thing in gc.get_objects() if isinstance(thing, OURS) and thing is not _CLOSED]
    return Counter(type(thing).__name__ for thing in ours)


def left_by_the_collector() -> Counter[str]:
    gc.collect()
    return left()


async def all_released(what: Callable[[], Counter[str]]) -> None:
    """Fails with what there still is after half a minute."""
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not what(), seconds=30)
    assert what() == Counter()


async def test_a_request_that_is_refused_is_released(nats_server: NatsServer, postgres: str) -> None:
    async with with_keys(nats_server, postgres) as gateway:
        for body, _ in INVALID.values():
            assert (await post(gateway, body))[0] == 400
        await gateway.http.close()  # a connection that is kept remembers its last request
        await all_released(left_by_the_collector)


@pytest.mark.timeout(120)
async def test_an_idle_session_costs_less_than_20_kb(nats_server: NatsServer, tmp_path: Path) -> None:
    count = 1_500
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    broker = await connect(NatsSettings(nats_server.url))
    await topology.ensure(broker, "dev")
    await broker.close()
    with gateway_process(nats_server.url, tmp_path / "log", options={"jwt_secret": SECRET}) as gateway:
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))

            async def join(number: int) -> None:
                socket = await http.ws_connect(f"http://127.0.0.1:{gateway.port}/v1/ws")
                stack.push_async_callback(socket.close)
                hello = {"op": "hello", "token": token(f"user{number}"), "device": "d", "cursor": "start"}
                await socket.send_json(hello)
                while '"live"' not in (await socket.receive(timeout=20)).data:
                    pass

            async def join_many(first: int, last: int) -> None:
                for start in range(first, last, 50):
                    await asyncio.gather(*(join(number) for number in range(start, start + 50)))

            await join_many(0, 500)  # buffers, caches and the allocator's arenas get their size
            before = await settled(gateway)
            await join_many(500, 500 + count)
            assert (await settled(gateway) - before) / count < 20 * 1_024


async def settled(gateway: GatewayProcess) -> int:
    """Its memory once it has not grown for longer than the second comparison of heads takes to come."""
    size, grown_at = 0, time.monotonic()
    while time.monotonic() - grown_at < 1.5:
        now = gateway.rss_bytes()
        if now > size + 65_536:
            size, grown_at = now, time.monotonic()
        await asyncio.sleep(0.1)
    return gateway.rss_bytes()
