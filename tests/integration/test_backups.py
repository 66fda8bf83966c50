"""EVENTS comes back from a backup while services publish: nothing that was accepted is passed over, whatever is forgotten."""

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker, StreamState
from engine.dispatch.dispatcher import Dispatcher
from engine.errors import PartitionStopped, TopologyError
from engine.log import incarnations
from engine.partition.reader import PartitionReader, Phase
from engine.topology import repair
from engine.topology import server as topology
from engine.topology.repair_plan import parse_positions
from ops.dev.servers import NatsServer, Valkey
from projections import runner
from projections.projection import INBOX
from projections.runner import ProjectionWorker
from projections.store import Checkpoint
from seamark.protocol.subjects import EVENTS_STREAM, encode_token, partition_of
from tests.support.backups import put_back, restore, snapshot, take
from tests.support.logs import FAST, all_records, connected, dispatching, eventually, publish

PARTITIONS = 4
USERS = [f"user{number}" for number in range(12)]
ROUND = len(USERS) + 1


@pytest.fixture
def clocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """One server, one clock: nobody needs to wait a minute for times to be told apart."""
    for module in (incarnations, runner):
        monkeypatch.setattr(module, "CLOCKS", timedelta(0))


async def publish_round(broker: Broker, name: str) -> None:
    """One personal event for each user, and one event for all of them."""
    for user in USERS:
        await publish(broker, to=[user], type="demo.personal", id=f"{name}-{user}")
    await publish(broker, to=USERS, type="demo.all", id=f"{name}-all", key="room")


def expected(*rounds: str) -> set[tuple[str, str]]:
    return {pair for name in rounds for user in USERS for pair in ((f"{name}-{user}", user), (f"{name}-all", user))}


async def counted(broker: Broker) -> Counter[tuple[str, str]]:
    """How often each (event, user) stands in the logs."""
    return Counter((entry.id, entry.user) for entry in await all_records(broker, PARTITIONS))


async def has_records(broker: Broker, *rounds: str) -> bool:
    return expected(*rounds) <= set(await counted(broker))


async def dispatched(server: NatsServer, valkey: Valkey, broker: Broker, *rounds: str) -> None:
    """Run a dispatcher until all of these rounds are in the logs, each record once, and nothing else."""
    async with dispatching(server.url, valkey.url):
        await eventually(lambda: has_records(broker, *rounds))
    records = await counted(broker)
    assert set(records) == expected(*rounds)
    assert set(records.values()) == {1}


def of_events(dispatcher: Dispatcher) -> list[PartitionReader]:
    """Who reads EVENTS: BULK was not restored, and goes on."""
    return [reader for reader in dispatcher.readers if reader._source.stream == EVENTS_STREAM]


def all_stopped(dispatcher: Dispatcher) -> bool:
    return all(reader.phase is Phase.STOPPED for reader in of_events(dispatcher))


@pytest.fixture
async def set_back(nats_server: NatsServer, valkey: Valkey, tmp_path: Path) -> NatsServer:
    """EVENTS holds round a, as its backup did; round b was dispatched and is lost."""
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_round(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
    take(nats_server, "EVENTS", tmp_path / "backup")
    async with connected(nats_server.url) as broker:
        await publish_round(broker, "b")
        await dispatched(nats_server, valkey, broker, "a", "b")
    put_back(nats_server, "EVENTS", tmp_path / "backup")
    return nats_server


async def test_events_accepted_before_the_restore_was_said_are_dispatched(set_back: NatsServer, valkey: Valkey) -> None:
    async with connected(set_back.url) as broker:
        await publish_round(broker, "c")  # takes the numbers that round b had
        await topology.restore(broker, ["EVENTS"], {"EVENTS": ROUND})
        await dispatched(set_back, valkey, broker, "a", "b", "c")


async def test_the_whole_way_of_a_restore_as_the_manual_tells_it(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_round(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
        backup, chunks = await snapshot(broker, "EVENTS")
        await publish_round(broker, "b")
        await dispatched(nats_server, valkey, broker, "a", "b")
        lost = await broker.stream("EVENTS")
        await broker.api("STREAM.DELETE.EVENTS")
        with pytest.raises(TopologyError, match="existed once"):
            await topology.apply(broker, await topology.plan(broker, "dev", overrides=FAST))
        await restore(broker, backup, chunks)
        await publish_round(broker, "c")
        found = await broker.stream("EVENTS")
        assert (found.epoch, found.last_seq) == (lost.epoch, lost.last_seq), (
            "nothing tells it from the one that was lost"
        )
        await topology.apply(broker, await topology.plan(broker, "dev", overrides=FAST))
        await topology.restore(broker, ["EVENTS"], {"EVENTS": backup["state"]["last_seq"]})
        await dispatched(nats_server, valkey, broker, "a", "b", "c")


async def test_the_end_of_the_backup_of_events_has_to_be_said_and_can_be_no_later_than_the_stream(
    set_back: NatsServer,
) -> None:
    async with connected(set_back.url) as broker:
        before = await topology.actual_epochs(broker)
        with pytest.raises(TopologyError, match=r"EVENTS=<last sequence>: state\.last_seq"):
            topology.parse_backups(["LOG-1", "EVENTS"])
        with pytest.raises(TopologyError, match=f"EVENTS ends at {ROUND}"):
            await topology.restore(broker, ["LOG-1", "EVENTS"], {"EVENTS": ROUND + 1})
        assert await topology.actual_epochs(broker) == before


@pytest.mark.usefixtures("clocks_agree")
async def test_an_end_that_is_too_late_is_noticed_by_the_times_and_the_true_one_is_asked_for(
    set_back: NatsServer, valkey: Valkey
) -> None:
    async with connected(set_back.url) as broker:
        await publish_round(broker, "c")
        await topology.restore(broker, ["EVENTS"], {"EVENTS": 2 * ROUND})
        async with dispatching(set_back.url, valkey.url) as dispatcher:
            await eventually(lambda: all(dispatcher.readers[q].phase is Phase.STOPPED for q in home_partitions()))
        plan = await repair.prepare(broker, parse_positions([]))
        assert {refusal.target for refusal in plan.refusals} == {f"partition {q}" for q in home_partitions()}
        assert all("Name the last event of the backup" in refusal.remedy for refusal in plan.refusals)
        plan = await repair.prepare(broker, parse_positions([str(ROUND)]))
        await repair.apply(broker, plan)
        await dispatched(set_back, valkey, broker, "a", "b", "c")


def home_partitions() -> set[int]:
    return {partition_of("default", encode_token(key), PARTITIONS) for key in (*USERS, "room")}


@pytest.mark.usefixtures("clocks_agree")
async def test_a_restore_that_nobody_said_stops_dispatchers_before_and_after_its_numbers_are_given_out_again(
    set_back: NatsServer, valkey: Valkey
) -> None:
    async with connected(set_back.url) as broker:
        async with dispatching(set_back.url, valkey.url) as dispatcher:
            await eventually(lambda: all_stopped(dispatcher))
        await publish_round(broker, "c")
        await publish_round(broker, "d")
        async with dispatching(set_back.url, valkey.url) as dispatcher:
            await eventually(lambda: all_stopped(dispatcher))
            for reader in of_events(dispatcher):
                with pytest.raises(PartitionStopped, match="younger than the mark"):
                    await reader._worker.position()
        plan = await repair.prepare(broker, parse_positions(["mark"]))
        assert all("seamark topology restore EVENTS=" in refusal.remedy for refusal in plan.refusals)
        assert len(plan.refusals) == PARTITIONS
        await topology.restore(broker, ["EVENTS"], {"EVENTS": ROUND})
        await dispatched(set_back, valkey, broker, "a", "b", "c", "d")


async def test_a_dispatcher_at_work_stops_when_events_goes_back_under_it(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await publish_round(broker, "a")
        await dispatched(nats_server, valkey, broker, "a")
    take(nats_server, "EVENTS", tmp_path / "backup")
    async with connected(nats_server.url) as broker, dispatching(nats_server.url, valkey.url) as dispatcher:
        await publish_round(broker, "b")
        await eventually(lambda: has_records(broker, "a", "b"))
        put_back(nats_server, "EVENTS", tmp_path / "backup")
        await eventually(lambda: all_stopped(dispatcher), seconds=60)


class Folded:
    """A projection that has folded up to a checkpoint."""

    def __init__(self, seq: int, epoch: str) -> None:
        self.reached = Checkpoint(epoch, seq)

    async def checkpoint(self) -> Checkpoint:
        return self.reached

    async def apply(self, *_: object) -> bool:
        raise AssertionError("nothing may be folded")


async def test_a_projection_stops_on_a_log_that_went_back_and_is_not_fooled_when_it_grows_again(
    nats_server: NatsServer,
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        for _ in range(3):
            await broker.append("log.1.default.alice", b"{}")
        store = Folded(5, (await broker.stream("LOG-1")).epoch or "")
        worker = ProjectionWorker(broker, INBOX, 1, store)
        with pytest.raises(PartitionStopped, match=r"topology restore LOG-1`, then `seamark rebuild inbox"):
            await worker.acquire()
        for _ in range(5):
            await broker.append("log.1.default.alice", b"{}")
        with pytest.raises(PartitionStopped):
            await worker.position()
        store.reached = Checkpoint(store.reached.epoch, 7)  # folded anew
        assert await worker.acquire() == 8


async def test_a_leader_that_has_shown_the_past_stops_a_projection_only_until_the_truth_is_known(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        for _ in range(5):
            await broker.append("log.1.default.alice", b"{}")
        state = await broker.stream("LOG-1")
        worker = ProjectionWorker(broker, INBOX, 1, Folded(5, state.epoch or ""))

        async def deposed(_name: str) -> StreamState:
            return replace(state, last_seq=3)

        with monkeypatch.context() as lying:
            lying.setattr(broker, "stream", deposed)
            with pytest.raises(PartitionStopped):
                await worker.acquire()
        assert await worker.position() == 6
