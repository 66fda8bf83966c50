"""Redis killed, emptied or frozen under load: what may go on goes on, what must not repeat waits, and it is said."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.dispatch.claims import claim_key
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.chaos import PARTITIONS, Chaos
from tests.support.logs import all_records, connected, eventually, publish
from tests.support.roles import DispatcherProcess, dispatcher_processes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

HORIZON_RESTARTS = "seamark_claims_horizon_restarts_total"
MISSED = "seamark_claims_missed_total"


async def restart_empty(valkey: Valkey) -> None:
    valkey.prepare()
    valkey.spawn()
    await asyncio.to_thread(valkey.wait_ready)


async def test_at_least_once_goes_on_without_redis_and_the_claims_are_written_when_it_is_back(
    broker: Broker, only: DispatcherProcess, valkey: Valkey, chaos: Chaos
) -> None:
    load = chaos.load(broker, shared=0.2, rate=200)
    await load.run(100)
    await eventually(lambda: only.metric(HORIZON_RESTARTS) == 1)
    valkey.kill()
    before = len(chaos.ledger.lines)
    await load.run(300)
    await chaos.settled(broker)
    await eventually(lambda: only.metric(MISSED, fate="owed") > 0)
    assert only.metric(MISSED, fate="lost") == 0
    without = [line.facts for line in chaos.ledger.lines[before:] if line.phase == "ok"]

    await restart_empty(valkey)
    async with Redis.from_url(valkey.url) as redis:
        keys = [claim_key("default", facts["event"]) for facts in without]
        await eventually(lambda: all_there(redis, keys), seconds=60)
    await eventually(lambda: only.metric(HORIZON_RESTARTS) == 2, seconds=60)
    # Published again, past the broker's own window: nothing is added.
    for facts in without[:50]:
        key = facts["event"].split(":")[1]
        await publish(broker, deduplicated=False, to=["user1"], type="chaos.n", id=facts["event"], key=key)
    await chaos.judge(broker)
    await eventually(lambda: only.metric("seamark_dispatcher_events_total", outcome="duplicate") >= 50)


async def test_effectively_once_waits_for_redis_and_is_appended_once_when_it_is_back(
    broker: Broker, only: DispatcherProcess, valkey: Valkey, chaos: Chaos
) -> None:
    fields = {"semantics": "effectively_once"}
    load = chaos.load(broker, shared=0.2, fields=fields)
    await load.run(100)
    await chaos.settled(broker)
    before = len(await all_records(broker, PARTITIONS))
    valkey.kill()
    await load.run(100)
    await eventually(lambda: only.said("claims_not_taken"))
    assert len(await all_records(broker, PARTITIONS)) == before
    assert only.metric(MISSED) == 0
    await restart_empty(valkey)
    assert await chaos.judge(broker) > before


async def test_a_frozen_redis_slows_at_least_once_down_and_stops_nothing(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev")  # with the pin's real time-out: what waits for Redis does not lose it
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
            first.start()
            second.start()
            load = chaos.load(broker, shared=0.2, rate=100)
            await load.run(50)
            valkey.suspend()
            await load.run(500)
            await chaos.settled(broker)
            valkey.resume()
            await load.run(50)
            await chaos.judge(broker)
            assert first.metric("seamark_partition_step_downs_total") == 0


async def test_a_dispatcher_killed_while_redis_is_away_leaves_nothing_lost_doubled_or_reordered(
    broker: Broker, first: DispatcherProcess, second: DispatcherProcess, valkey: Valkey, chaos: Chaos
) -> None:
    load = chaos.load(broker, shared=0.4, rate=150)
    running = asyncio.create_task(load.run(600), name="load")
    await eventually(lambda: load.acknowledged > 100)
    valkey.kill()
    await eventually(lambda: load.acknowledged > 250)
    first.kill()
    await eventually(lambda: load.acknowledged > 400)
    await restart_empty(valkey)
    second.kill()
    first.start()
    await running
    await chaos.judge(broker)


async def test_a_redis_without_memory_misses_claims_and_says_so_and_stops_nothing(
    broker: Broker, only: DispatcherProcess, valkey: Valkey, chaos: Chaos
) -> None:
    async with Redis.from_url(valkey.url) as redis:
        load = chaos.load(broker, shared=0.2, rate=200)
        await load.run(50)
        await chaos.settled(broker)
        await redis.config_set("maxmemory", "1")
        await load.run(100)
        await chaos.settled(broker)
        await eventually(lambda: only.metric(MISSED, fate="owed") > 0)
        await eventually(lambda: only.said("claims_not_taken"))
        await redis.config_set("maxmemory", "0")
        keys = [claim_key("default", line.facts["event"]) for line in chaos.ledger.lines if line.phase == "ok"]
        await eventually(lambda: all_there(redis, keys), seconds=60)
        await chaos.judge(broker)


async def all_there(redis: Redis, keys: list[str]) -> bool:
    return None not in await redis.mget(keys)
