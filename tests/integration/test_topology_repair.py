"""Streams are lost, restored and re-created under a real dispatcher; an operator repairs, and it goes on."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.dispatch.dispatcher import Dispatcher
from engine.errors import TopologyError
from engine.partition.reader import Phase
from engine.topology import repair
from engine.topology import server as topology
from engine.topology.repair_plan import parse_positions
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.subjects import encode_token, partition_of
from tests.support.logs import FAST, all_records, connected, dispatching, eventually, publish

PARTITIONS = 4
USERS = [f"user{number}" for number in range(12)]


def home(user: str) -> int:
    return partition_of("default", encode_token(user), PARTITIONS)


async def publish_to_everybody(broker: Broker, round_: str) -> None:
    """One personal event for each user, and one event for all of them."""
    for user in USERS:
        await publish(broker, to=[user], type="demo.personal", id=f"{round_}-{user}")
    await publish(broker, to=USERS, type="demo.all", id=f"{round_}-all", key="room")


async def counted(broker: Broker) -> Counter[tuple[str, str]]:
    """How often each (event, user) stands in the logs."""
    return Counter((entry.id, entry.user) for entry in await all_records(broker, PARTITIONS))


def expected(*rounds: str) -> set[tuple[str, str]]:
    return {pair for name in rounds for user in USERS for pair in ((f"{name}-{user}", user), (f"{name}-all", user))}


async def dispatched(nats: NatsServer, valkey: Valkey, broker: Broker, *rounds: str) -> None:
    """Run a dispatcher until all of these rounds are in the logs."""
    async with dispatching(nats.url, valkey.url):
        await eventually(lambda: all_there(broker, *rounds))
        await eventually(lambda: caught_up(broker))


async def all_there(broker: Broker, *rounds: str) -> bool:
    return expected(*rounds) <= set(await counted(broker))


async def caught_up(broker: Broker) -> bool:
    """Whether every home mark has reached the last event of its partition."""
    found = await repair.examine(broker)
    for q in range(PARTITIONS):
        last, mark = await broker.leader_last("EVENTS", f"ev.{q}.>"), found.known(q, q)
        if last is not None and (mark is None or mark.next_seq <= last.seq):
            return False
    return True


async def repaired(broker: Broker, valkey: Valkey, *positions: str, forget_claims: bool = False) -> list[str]:
    async with Redis.from_url(valkey.url) as redis:
        plan = await repair.prepare(broker, parse_positions(positions), forget_claims=forget_claims)
        return await repair.apply(broker, plan, redis)


def events_folder(server: NatsServer) -> Path:
    return server.data / "store" / "jetstream" / "$G" / "streams" / "EVENTS"


async def test_a_healthy_topology_needs_no_repair(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_to_everybody(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
        plan = await repair.prepare(broker, parse_positions([]))
        assert plan.lines() == ["nothing to repair"]


async def test_running_dispatchers_are_named_and_nothing_is_done(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev")  # who reads keeps a pin through a moment in which nothing goes on
        async with dispatching(nats_server.url, valkey.url):
            await publish_to_everybody(broker, "a")
            await eventually(lambda: all_there(broker, "a"))
            plan = await repair.prepare(broker, parse_positions(["first"]))
            with pytest.raises(TopologyError, match=r"dispatchers are running: EVENTS\.dispatch-"):
                await repair.apply(broker, plan, wait_seconds=0)
        await repair.check_stopped(broker, wait_seconds=30)


async def test_marks_that_moved_since_the_plan_are_not_overwritten(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_to_everybody(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
        plan = await repair.prepare(broker, parse_positions(["first"]))
        await publish_to_everybody(broker, "b")
        await dispatched(nats_server, valkey, broker, "b")
        with pytest.raises(TopologyError, match="moved while this was planned"):
            await repair.apply(broker, plan)
        assert set((await counted(broker)).values()) == {1}


async def test_a_lost_log_is_filled_again_from_the_events_and_the_other_logs_get_nothing_twice(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_to_everybody(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
        lost = home(USERS[0])
        await broker.api(f"STREAM.DELETE.LOG-{lost}")
        await topology.ensure(broker, "dev", overrides=FAST)

        async with dispatching(nats_server.url, valkey.url) as dispatcher:
            await publish_to_everybody(broker, "b")
            await eventually(lambda: stopped_or_waiting(dispatcher, lost))
        with pytest.raises(TopologyError, match=f"LOG-{lost} was re-created and holds no mark"):
            await repaired(broker, valkey)
        assert any(f"replace epochs: LOG-{lost} " in line for line in (await plan_lines(broker, f"{lost}=first")))
        await repaired(broker, valkey, f"{lost}=first")

        async with dispatching(nats_server.url, valkey.url):
            personal = {pair for pair in expected("a", "b") if not pair[0].endswith("-all")}
            await eventually(lambda: holds(broker, personal | expected("b")))
            await eventually(lambda: caught_up(broker))
        records = await counted(broker)
        assert set(records.values()) == {1}
        assert (await repair.prepare(broker, parse_positions([]))).empty


async def stopped_or_waiting(dispatcher: Dispatcher, partition: int) -> bool:
    return dispatcher.readers[partition].phase is Phase.STOPPED


async def plan_lines(broker: Broker, *positions: str) -> list[str]:
    return (await repair.prepare(broker, parse_positions(positions))).lines()


async def holds(broker: Broker, pairs: set[tuple[str, str]]) -> bool:
    return pairs <= set(await counted(broker))


async def test_events_restored_from_a_backup_go_on_where_it_ended_and_nothing_comes_twice(
    fresh_nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    server = fresh_nats_server
    async with connected(server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_to_everybody(broker, "a")
        await dispatched(server, valkey, broker, "a")
    server.stop()
    shutil.copytree(events_folder(server), tmp_path / "backup")
    server.start()
    async with connected(server.url) as broker:
        await publish_to_everybody(broker, "b")
        await dispatched(server, valkey, broker, "a", "b")
    server.stop()
    shutil.rmtree(events_folder(server))
    shutil.copytree(tmp_path / "backup", events_folder(server))
    server.start()

    async with connected(server.url) as broker:
        await topology.restore(broker, ["EVENTS"], {"EVENTS": len(USERS) + 1})
        await publish_to_everybody(broker, "c")  # takes the numbers that round b had
        await publish(broker, to=[USERS[0]], type="demo.personal", id=f"b-{USERS[0]}")  # a service that is not sure
        await dispatched(server, valkey, broker, "a", "b", "c")
        records = await counted(broker)
        assert set(records) == expected("a", "b", "c")
        assert set(records.values()) == {1}


async def test_events_dispatched_again_after_a_restore_do_not_take_themselves_for_duplicates(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_to_everybody(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
        # Everything comes from a backup in which EVENTS was newer than the logs.
        await topology.restore(broker, ["EVENTS"], {"EVENTS": len(USERS) + 1})
        for p in range(PARTITIONS):
            await broker.api(f"STREAM.DELETE.LOG-{p}")
        await topology.ensure(broker, "dev", overrides=FAST)
        await repaired(broker, valkey, "first")
        await dispatched(nats_server, valkey, broker, "a")
        records = await counted(broker)
        assert set(records) == expected("a")
        assert set(records.values()) == {1}


@pytest.mark.parametrize("logs_lost", [False, True])
async def test_recreated_events_want_a_named_position_and_claims_tell_duplicates_unless_the_logs_are_lost_too(
    nats_server: NatsServer, valkey: Valkey, logs_lost: bool
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_to_everybody(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
        for stream in ["EVENTS", *(f"LOG-{p}" for p in range(PARTITIONS) if logs_lost)]:
            await broker.api(f"STREAM.DELETE.{stream}")
        await topology.ensure(broker, "dev", overrides=FAST)
        # Services publish again what they are not sure of, under the very numbers the events had.
        await publish_to_everybody(broker, "a")
        await publish_to_everybody(broker, "b")
        with pytest.raises(TopologyError, match="Name"):
            await repaired(broker, valkey)
        await repaired(broker, valkey, "first", forget_claims=logs_lost)
        await dispatched(nats_server, valkey, broker, "a", "b")
        records = await counted(broker)
        assert set(records.values()) == {1}
