"""The control bucket: nobody overwrites what he has not read, and every process learns of every change within a second."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from engine.broker.control import ControlBucket, Entry
from engine.broker.jetstream import Broker
from engine.errors import ApiError
from engine.limits import CONTROL_READ_SECONDS
from engine.topology import server as topology
from ops.dev.servers import NatsServer
from tests.support.logs import FAST, connected, eventually

PREFIX = "switch."
SOON_SECONDS = 20.0
"""A second is what is promised (ADR 0039 says what was measured); a machine that runs other tests as well may need longer."""


class Switch(msgspec.Struct):
    """As an operator sets one."""

    why: str
    percent: int = 0


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


@asynccontextmanager
async def watching(broker: Broker) -> AsyncIterator[Callable[[], Any]]:
    """What a watch has told last."""
    told: list[dict[str, Switch]] = []
    task = asyncio.create_task(ControlBucket(broker, Switch, PREFIX).watch(told.append), name="watch")
    try:
        await eventually(lambda: told)
        yield lambda: told[-1]
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_entry_is_replaced_only_by_whom_knows_what_it_holds(broker: Broker) -> None:
    one, other = ControlBucket(broker, Switch, PREFIX), ControlBucket(broker, Switch, PREFIX)
    assert await one.get("push") == Entry(None, 0)
    first = await one.put("push", Switch("outage"), 0)
    with pytest.raises(ApiError) as refused:
        await other.put("push", Switch("mine"), 0)
    assert refused.value.err_code == 10071
    assert await other.get("push") == Entry(Switch("outage"), first)
    second = await other.put("push", Switch("over", 10), first)
    assert await one.get("push") == Entry(Switch("over", 10), second)


async def test_what_is_no_entry_is_refused_by_name(broker: Broker) -> None:
    await broker.append("$KV.control.switch.push", b'{"why":7}')
    with pytest.raises(msgspec.DecodeError):
        await ControlBucket(broker, Switch, PREFIX).get("push")


async def test_a_watch_tells_what_is_there_then_every_change_and_what_was_taken_away(
    broker: Broker, nats_server: NatsServer
) -> None:
    control = ControlBucket(broker, Switch, PREFIX)
    revision = await control.put("push", Switch("outage"), 0)
    async with connected(nats_server.url) as far, watching(far) as told:
        assert told() == {"push": Switch("outage")}
        await control.put("sms", Switch("price"), 0)
        await control.put("push", Switch("over"), revision)
        await broker.append("$KV.control.epochs", b"{}")  # another prefix
        await broker.append("$KV.control.switch.odd", b"not JSON")
        both = {"push": Switch("over"), "sms": Switch("price")}
        await eventually(lambda: told() == both, seconds=SOON_SECONDS)
        await broker.append("$KV.control.switch.sms", b"", {"KV-Operation": "DEL"})  # what `nats kv del` does
        await eventually(lambda: told() == {"push": Switch("over")}, seconds=SOON_SECONDS)


async def test_a_change_is_told_although_no_news_of_it_came(broker: Broker) -> None:
    control = ControlBucket(broker, Switch, PREFIX)
    await control.put("push", Switch("outage"), 0)
    async with watching(broker) as told:
        # A purge is published nowhere, so it stands for news that were lost.
        await broker.api("STREAM.PURGE.KV_control", {"filter": "$KV.control.switch.push"})
        await eventually(lambda: told() == {}, seconds=SOON_SECONDS)


async def test_a_bucket_that_was_made_anew_is_read_from_its_beginning(broker: Broker) -> None:
    control = ControlBucket(broker, Switch, PREFIX)
    for number in range(20):
        await control.put(f"s{number}", Switch("old"), 0)
    async with watching(broker) as told:
        assert len(told()) == 20
        await broker.api("STREAM.DELETE.KV_control")
        await topology.ensure(broker, "dev", overrides=FAST)
        await control.put("push", Switch("new"), 0)
        await eventually(lambda: told() == {"push": Switch("new")}, seconds=SOON_SECONDS)


async def test_a_watch_outlives_the_broker_and_says_how_old_its_knowledge_is(
    broker: Broker, nats_server: NatsServer
) -> None:
    control, told = ControlBucket(broker, Switch, PREFIX), []
    task = asyncio.create_task(control.watch(told.append), name="watch")
    try:
        await eventually(lambda: told)
        nats_server.kill()
        await eventually(lambda: not broker.connected)
        read_at = control.read_at
        await asyncio.sleep(
            2 * CONTROL_READ_SECONDS
        )  # nothing may be read while the broker is away: no event to wait for
        assert control.read_at == read_at
        nats_server.start()
        await eventually(lambda: control.read_at > read_at)
        await control.put("push", Switch("outage"), 0)
        await eventually(lambda: told[-1] == {"push": Switch("outage")}, seconds=SOON_SECONDS)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
