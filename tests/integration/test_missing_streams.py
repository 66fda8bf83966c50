"""A stream is gone, or what is recorded of the streams is unreadable: it is named with the remedy, and nobody tries for ever."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from redis.asyncio import Redis
from structlog.testing import capture_logs

from engine.broker.jetstream import Broker, Outgoing
from engine.dispatch import dispatcher
from engine.dispatch.dispatcher import Dispatcher
from engine.dispatch.source import EVENTS
from engine.dispatch.worker import DispatchWorker
from engine.errors import PartitionStopped, TopologyError
from engine.log.incarnations import read_partitions
from engine.log.marks import NO_MARK
from engine.log.writer import MarkedWriter, Ownership
from engine.partition import reader as partition
from engine.partition.reader import Phase
from engine.topology import server as topology
from engine.topology.check import report_start
from ops.dev.servers import NatsServer, Valkey
from projections.projection import INBOX
from projections.rebuild.unread import rebuild_unread
from projections.runner import ProjectionWorker
from seamark.protocol.subjects import partition_of
from tests.support.logs import FAST, all_records, connected, dispatching, eventually, publish
from tests.support.overlays import SYNCED_LATE

PARTITIONS = 4
HOME, FOREIGN = 0, 1


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "EPOCH_WATCH_SECONDS", 0.2)
    monkeypatch.setattr(partition, "STOPPED_RETRY_SECONDS", 0.5)


def stopped(working: Dispatcher, *partitions: int) -> Callable[[], bool]:
    return lambda: all(working.readers[q].phase is Phase.STOPPED for q in partitions or range(PARTITIONS))


async def test_without_events_a_role_is_told_what_to_run(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        with pytest.raises(TopologyError, match=r"no stream EVENTS.*seamark topology apply"):
            await read_partitions(broker)


async def test_events_deleted_under_a_dispatcher_stop_it_and_are_named(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url) as working:
            await worked(broker, "e1")
            with capture_logs() as logs:
                await broker.api("STREAM.DELETE.EVENTS")
                await eventually(stopped(working))
            assert {line["why"] for line in logs if line["log_level"] == "error"} == {"there is no stream EVENTS"}
            with pytest.raises(PartitionStopped, match="Restore it from a backup"):
                await working.readers[0]._worker.position()


async def worked(broker: Broker, event_id: str) -> None:
    """Everybody's partition has dispatched something."""
    for user in range(12):
        await publish(broker, to=[f"user{user}"], type="demo", id=f"{event_id}-{user}")
    await eventually(lambda: holds(broker, 12, event_id))


async def holds(broker: Broker, count: int, event_id: str) -> bool:
    return sum(entry.id.startswith(event_id) for entry in await all_records(broker, PARTITIONS)) == count


@pytest.mark.parametrize("again", [False, True])
async def test_a_log_that_is_deleted_under_a_batch_stops_its_partition(nats_server: NatsServer, again: bool) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        state = await broker.stream("LOG-1")
        facts = {"epoch": state.epoch or "", "found": NO_MARK, "mark": None, "start_seq": 0}
        writer = await MarkedWriter.take_over(broker, EVENTS.marked(1, 1), Ownership(1, "owner", "eeeeeeee"), **facts)
        config = (await broker.api("STREAM.INFO.LOG-1"))["config"]
        older = await broker.leader_last("LOG-1", "mark.1.1")
        assert older is not None
        for seq in (1, 2):
            await writer.append([Outgoing("log.1.default.alice", b"{}")], seq)
        await broker.api("STREAM.DELETE.LOG-1")
        if again:  # as a restored backup has it: the same epoch, and the mark of that time
            await broker.api("STREAM.CREATE.LOG-1", config)
            await broker.append("mark.1.1", older.payload)
        stopping = pytest.raises(PartitionStopped, match="LOG-1 ends at 1" if again else "no stream LOG-1")
        with stopping:
            await asyncio.wait_for(writer.append([Outgoing("log.1.default.alice", b"{}")], 3), 20)


async def test_while_one_log_is_missing_the_others_are_still_watched(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url) as working:
            await worked(broker, "e1")
            await broker.api("STREAM.DELETE.LOG-3")
            await eventually(stopped(working, 3))
            assert all(working.readers[q].phase is Phase.READING for q in (0, 1, 2))
            await broker.api("STREAM.DELETE.LOG-1")
            await eventually(stopped(working, 1, 3))
            assert all(working.readers[q].phase is Phase.READING for q in (0, 2))


async def test_a_partition_stopped_for_another_ones_log_stays_so_until_that_is_mended_and_stores_nothing_meanwhile(
    nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    position = DispatchWorker.position

    async def counted(worker: DispatchWorker) -> int:
        nonlocal looks
        looks += worker._q == HOME
        return await position(worker)

    monkeypatch.setattr(DispatchWorker, "position", counted)
    user = next(f"user{n}" for n in range(99) if partition_of("default", f"user{n}", PARTITIONS) == FOREIGN)
    key = next(f"key{n}" for n in range(99) if partition_of("default", f"key{n}", PARTITIONS) == HOME)
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        broken = await broker.append(f"mark.{FOREIGN}.{HOME}", b"no mark")
        async with dispatching(nats_server.url, valkey.url) as working:
            await publish(broker, to=[user], type="demo", id="e1", key=key)
            await eventually(stopped(working, HOME))
            stored = (await broker.stream(f"LOG-{HOME}")).last_seq
            looks = 0
            with capture_logs() as logs:
                await eventually(lambda: looks >= 4)
            assert stopped(working, HOME)()
            assert (await broker.stream(f"LOG-{HOME}")).last_seq == stored
            assert [line["event"] for line in logs if line["log_level"] == "error"] == []
            await broker.api(f"STREAM.MSG.DELETE.LOG-{FOREIGN}", {"seq": broken.seq})
            await eventually(lambda: holds(broker, 1, "e1"))


async def test_without_the_control_bucket_a_partition_stops_and_goes_on_once_it_is_made_again(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await broker.api("STREAM.DELETE.KV_control")
        with pytest.raises(TopologyError, match=r"no stream KV_control.*seamark topology apply"):
            await topology.read_epochs(broker)
        async with dispatching(nats_server.url, valkey.url) as working:
            await eventually(stopped(working))
            await topology.ensure(broker, "dev", overrides=FAST)
            await worked(broker, "e1")


async def test_epochs_edited_by_hand_stop_dispatchers_and_commands_with_the_way_out(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await broker.append("$KV.control.epochs", b"EVENTS=abc")
        with pytest.raises(TopologyError, match="nats kv del control epochs"):
            await topology.plan(broker, "dev")
        async with dispatching(nats_server.url, valkey.url) as working:
            await eventually(stopped(working))
            await broker.append("$KV.control.epochs", b"", {"KV-Operation": "DEL"})  # what `nats kv del` does
            await topology.ensure(broker, "dev", overrides=FAST)
            await worked(broker, "e1")


async def test_a_projection_of_a_missing_log_stops_and_names_it(nats_server: NatsServer) -> None:
    class Nothing:
        async def checkpoint(self) -> None:
            return None

    async with connected(nats_server.url) as broker:
        worker = ProjectionWorker(broker, INBOX, 1, Nothing())  # type: ignore[arg-type]
        with pytest.raises(PartitionStopped, match="no stream LOG-1"):
            await worker.acquire()


@pytest.mark.parametrize(("profile", "told"), [("dev", []), ("production", ["replicas"])])
async def test_a_start_says_what_the_server_does_otherwise_than_the_profile_needs(
    nats_server: NatsServer, tmp_path: Path, profile: str, told: list[str]
) -> None:
    structlog.reset_defaults()
    async with connected(nats_server.url) as broker:
        with capture_logs() as logs:
            await report_start(broker, profile)  # type: ignore[arg-type]
            assert [line["event"] for line in logs] == ["copies_not_read"]
        await topology.ensure(broker, "dev", overrides=FAST)
        with capture_logs() as logs:
            await report_start(broker, profile)  # type: ignore[arg-type]
            assert [line["what"] for line in logs] == told
            assert all("EVENTS has 1" in line["detail"] for line in logs)
        with capture_logs() as logs:
            await report_start(broker, profile, [nats_server.monitor_url])  # type: ignore[arg-type]
            assert [line["what"] for line in logs] == told
        late = NatsServer(tmp_path / "late", overlay=SYNCED_LATE)
        late.start()
        try:
            with capture_logs() as logs:
                await report_start(broker, profile, [late.monitor_url])  # type: ignore[arg-type]
                assert [line["what"] for line in logs] == ["sync_always", *told]
        finally:
            late.kill()


async def test_what_else_answers_at_a_monitoring_address_ends_no_start(nats_server: NatsServer) -> None:
    async def no_server(_: web.Request) -> web.Response:
        return web.json_response({"jetstream": "yes"})

    application = web.Application()
    application.router.add_get("/varz", no_server)
    structlog.reset_defaults()
    async with connected(nats_server.url) as broker, TestServer(application) as other:
        await topology.ensure(broker, "dev", overrides=FAST)
        with capture_logs() as logs:
            await report_start(broker, "dev", [str(other.make_url("/"))])
        assert [line["event"] for line in logs if line["log_level"] == "error"] == []


async def test_a_rebuild_without_one_of_its_logs_names_it(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", overrides=FAST)
        await broker.api("STREAM.DELETE.LOG-1")
        with pytest.raises(TopologyError, match=r"no stream LOG-1.*seamark topology apply"):
            await rebuild_unread(broker, redis, PARTITIONS)
