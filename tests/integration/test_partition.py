"""The partition reader on a real server: whatever happens, its worker sees every message once, in order, by its position."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from engine import partition
from engine.errors import ApiError, PartitionStopped, StepDown, Unavailable
from engine.jetstream import Broker, StreamState
from engine.limits import BUFFERED_PULLS_MAX, PULL_BATCH, PULL_BYTES
from engine.natsclient import outgoing
from engine.partition import Delivered, PartitionReader, Phase, Source
from seamark.dev.servers import NatsCluster, NatsServer
from tests.support.logs import connected, eventually
from tests.support.network import bad_network

PIN_TIMEOUT_SECONDS = 1.0
SOURCE = Source("EV", "reader", "ev.0.>")


class Store:
    """Where the effect and the position of the partition live. It refuses whoever is not the last to have acquired it."""

    def __init__(self) -> None:
        self.next_seq = 1
        self.owner: object = None
        self.applied: list[int] = []
        self.changed = asyncio.Event()

    def apply(self, owner: object, batch: list[Delivered]) -> None:
        if owner is not self.owner:
            raise StepDown("another owner")
        for message in batch:
            assert message.seq >= self.next_seq, "a message came again, or out of order"
            assert message.payload == b"%d" % len(self.applied), "a message was passed over"
            self.applied.append(message.seq)
            self.next_seq = message.seq + 1


class RecordingWorker:
    """Applies to a store; `before` may stop, delay or fail a batch, `after` the answer to it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.acquired = 0
        self.batches = 0
        self.before: Callable[[list[Delivered]], Awaitable[None]] | None = None
        self.after: Callable[[], None] | None = None
        self.refusal: PartitionStopped | None = None
        self.token = object()

    async def acquire(self) -> int:
        if self.refusal:
            raise self.refusal
        self.acquired += 1
        self.token = self._store.owner = object()
        return self._store.next_seq

    async def position(self) -> int:
        if self.refusal:
            raise self.refusal
        return self._store.next_seq

    def check(self, state: StreamState) -> None:
        """Nothing is ever wrong with the stream."""

    async def handle(self, batch: list[Delivered]) -> None:
        self.batches += 1
        if self.before:
            await self.before(batch)
        self._store.apply(self.token, batch)
        if self.after:
            self.after()


async def make_stream(broker: Broker, replicas: int = 1) -> None:
    await broker.api(
        "STREAM.CREATE.EV",
        {"name": "EV", "subjects": ["ev.>"], "storage": "file", "num_replicas": replicas, "allow_direct": True},
    )
    await make_consumer(broker, replicas)


async def make_consumer(broker: Broker, replicas: int = 1) -> None:
    config = {
        "durable_name": "reader",
        "filter_subject": "ev.0.>",
        "ack_policy": "none",
        "deliver_policy": "all",
        "priority_policy": "pinned_client",
        "priority_groups": ["owner"],
        "priority_timeout": int(PIN_TIMEOUT_SECONDS * 1e9),
        "num_replicas": replicas,
    }
    body = {"stream_name": "EV", "config": config}
    await broker.api("CONSUMER.CREATE.EV.reader.ev.0.>", body)


class Load:
    """Publishes numbered messages of the partition, with others between them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.count = 0

    async def publish(self, count: int) -> None:
        for _ in range(count):
            if random.random() < 0.3:
                self._broker.publish("ev.1.other", b"x")
            self._broker.publish("ev.0.one", b"%d" % self.count)
            self.count += 1
        await self._broker.flush()

    async def surely(self, count: int) -> None:
        """One by one, through whatever happens to the server."""
        for _ in range(count):
            await self._broker.append("ev.0.one", b"%d" % self.count, msg_id=f"m{self.count}")
            self.count += 1


@contextlib.asynccontextmanager
async def reading(broker: Broker, worker: Any) -> AsyncIterator[PartitionReader]:
    reader = PartitionReader(broker, SOURCE, worker, pin_timeout_seconds=PIN_TIMEOUT_SECONDS)
    task = asyncio.create_task(reader.run(), name="reader")
    try:
        yield reader
    finally:
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task  # a reader that failed says why, whatever else did not happen then


async def done(store: Store, load: Load, *, seconds: float = 15) -> None:
    await eventually(lambda: len(store.applied) >= load.count, seconds=seconds)
    assert len(store.applied) == load.count


# --- the straight way ------------------------------------------------------------------------------------------------------


async def test_every_message_of_the_partition_is_handled_once_in_order(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load = Store(), Load(broker)
        await load.publish(2000)
        worker = RecordingWorker(store)
        async with reading(broker, worker) as reader:
            await load.publish(2000)
            await done(store, load)
            for _ in range(20):
                await load.publish(1)
                await done(store, load)
            assert reader.phase is Phase.READING
        assert worker.acquired == 1


async def test_reading_starts_at_the_workers_position_not_at_the_consumers(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load = Store(), Load(broker)
        await load.publish(1000)
        last = (await broker.stream("EV")).last_seq
        # The consumer's head stands at the end; nothing comes by itself, and nobody has applied anything.
        await broker.api("CONSUMER.RESET.EV.reader", {"seq": last + 1})
        async with reading(broker, RecordingWorker(store)):
            await done(store, load, seconds=PIN_TIMEOUT_SECONDS * 3)


async def test_a_reader_that_ends_gives_its_pin_back_and_the_standby_goes_on_at_once(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as one, connected(nats_server.url) as other:
        await make_stream(one)
        store, load = Store(), Load(one)
        async with reading(other, RecordingWorker(store)) as standby:
            async with reading(one, RecordingWorker(store)) as owner:
                await load.publish(100)
                await done(store, load)
                first, second = (owner, standby) if owner.phase is Phase.READING else (standby, owner)
                assert (first.phase, second.phase) == (Phase.READING, Phase.STANDBY)
            await load.publish(100)
            await done(store, load, seconds=PIN_TIMEOUT_SECONDS)
            assert standby.phase is Phase.READING
        assert len(one.nc._subs) == len(one.nc.parser.handlers)


async def test_a_reader_that_ends_while_disconnected_leaves_no_subscription_behind(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        before = set(broker.nc._subs)
        async with reading(broker, RecordingWorker(Store())):
            nats_server.kill()
            await eventually(lambda: not broker.connected)
        assert set(broker.nc._subs) == before
        assert broker.on_reconnect == []
        nats_server.start()


# --- disturbances ------------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_killed_and_started_again_costs_no_message(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker, connected(nats_server.url) as publisher:
        await make_stream(broker)
        store, load = Store(), Load(publisher)
        async with reading(broker, RecordingWorker(store)):
            for _ in range(3):
                await load.publish(700)
                await load.surely(1)  # then what was published before it is stored
                publishing = asyncio.create_task(load.surely(30), name="load")
                await asyncio.to_thread(nats_server.kill)
                nats_server.start()
                await publishing
                await eventually(lambda: publisher.connected)
            await done(store, load, seconds=20)


async def test_an_operator_who_takes_the_pin_away_costs_no_message(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker, connected(nats_server.url) as other:
        await make_stream(broker)
        store, load = Store(), Load(other)
        async with reading(broker, RecordingWorker(store)):
            for _ in range(10):
                await load.publish(300)
                await other.api("CONSUMER.UNPIN.EV.reader", {"group": "owner"})
                await load.publish(300)
            await done(store, load)


async def test_a_stranger_who_resets_the_consumer_costs_no_message(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker, connected(nats_server.url) as other:
        await make_stream(broker)
        store, load = Store(), Load(other)
        async with reading(broker, RecordingWorker(store)):
            for _ in range(20):
                await load.publish(200)
                await other.api("CONSUMER.RESET.EV.reader", {"seq": random.randint(1, load.count)})
                await load.publish(200)
            await done(store, load)
            # Also when nothing follows that would show the gap.
            last = (await other.stream("EV")).last_seq
            await other.api("CONSUMER.RESET.EV.reader", {"seq": last + 10})
            await load.publish(5)
            await done(store, load, seconds=PIN_TIMEOUT_SECONDS * 3)


async def test_connections_cut_under_load_cost_no_message(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker, connected(nats_server.url) as publisher:
        await make_stream(publisher)
        store, load = Store(), Load(publisher)
        async with reading(broker, RecordingWorker(store)):
            for _ in range(5):
                await load.publish(1500)
                transport = outgoing(broker.nc)
                assert transport is not None
                transport.abort()
                await load.publish(1500)
                await eventually(lambda: broker.connected)
            await done(store, load)


async def test_a_consumer_deleted_and_made_again_is_read_from_the_position(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker, connected(nats_server.url) as other:
        await make_stream(broker)
        store, load = Store(), Load(other)
        async with reading(broker, RecordingWorker(store)):
            await load.publish(300)
            await done(store, load)
            await other.api("CONSUMER.DELETE.EV.reader")
            await load.publish(300)
            await make_consumer(other)
            await load.publish(300)
            await done(store, load, seconds=10)


async def test_failures_of_the_worker_are_retried_from_its_position(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "RETRY_SECONDS_MIN", 0.01)
    monkeypatch.setattr(partition, "RETRY_SECONDS_MAX", 0.02)
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load = Store(), Load(broker)
        worker = RecordingWorker(store)
        failures: list[Exception] = [Unavailable("x"), OSError("y"), TimeoutError(), ApiError(503, 10077, "full")] * 3

        async def before(batch: list[Delivered]) -> None:
            if len(failures) % 2:
                raise failures.pop()

        def after() -> None:
            if failures:
                raise failures.pop()

        worker.before, worker.after = before, after
        async with reading(broker, worker):
            while failures:
                await load.publish(20)
                await done(store, load)


async def test_a_stopped_partition_does_nothing_until_it_is_repaired(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "STOPPED_RETRY_SECONDS", 0.05)
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load = Store(), Load(broker)
        worker = RecordingWorker(store)

        async def before(batch: list[Delivered]) -> None:
            if worker.refusal:
                raise worker.refusal

        worker.before = before
        async with reading(broker, worker) as reader:
            for _ in range(3):
                await load.publish(100)
                await done(store, load)
                worker.refusal = PartitionStopped("the log was re-created", "Repair it")
                await load.publish(100)
                await eventually(lambda: reader.phase is Phase.STOPPED)
                batches = worker.batches
                await asyncio.sleep(0.3)
                assert worker.batches == batches
                assert reader._buffer == []
                worker.refusal = None
                await done(store, load, seconds=PIN_TIMEOUT_SECONDS * 4)


# --- two readers --------------------------------------------------------------------------------------------------------------


async def test_a_standby_takes_over_from_an_owner_that_vanished_and_is_not_disturbed_when_it_comes_back(
    nats_server: NatsServer,
) -> None:
    async with (
        bad_network(nats_server.port) as network,
        connected(f"nats://127.0.0.1:{network.port}") as far,
        connected(nats_server.url) as near,
        connected(nats_server.url) as publisher,
    ):
        await make_stream(publisher)
        store, load = Store(), Load(publisher)
        vanishing = RecordingWorker(store)
        held = asyncio.Event()
        async with reading(far, vanishing) as first:
            await load.publish(100)
            await done(store, load)
            async with reading(near, RecordingWorker(store)) as second:

                async def hold(batch: list[Delivered]) -> None:
                    await held.wait()

                # It vanishes with messages in hand that it never applies: the reading head is beyond the position.
                vanishing.before = hold
                await load.publish(2500)
                await eventually(lambda: vanishing.batches > 1 and first._buffer)
                network.cut()
                started = time.monotonic()
                await done(store, load, seconds=10)
                assert time.monotonic() - started < PIN_TIMEOUT_SECONDS + 1.5
                assert second.phase is Phase.READING
                network.restore()
                held.set()
                vanishing.before = None
                await eventually(lambda: far.connected)
                await load.publish(500)
                await done(store, load)
                await eventually(lambda: first.phase is Phase.STANDBY)


async def test_a_slow_worker_loses_its_pin_with_a_bounded_buffer_and_steps_down(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as one, connected(nats_server.url) as other:
        await make_stream(one)
        store, load = Store(), Load(other)
        slow = RecordingWorker(store)
        go_on = asyncio.Event()

        async def wait(batch: list[Delivered]) -> None:
            await go_on.wait()

        slow.before = wait
        async with reading(one, slow) as first:
            await load.publish(1)
            await eventually(lambda: slow.batches == 1)
            await load.publish(5000)
            await eventually(lambda: len(first._buffer) > PULL_BATCH)
            async with reading(other, RecordingWorker(store)):
                await done(store, load)
                assert len(first._buffer) <= PULL_BATCH * BUFFERED_PULLS_MAX
                go_on.set()
                await eventually(lambda: first.phase is Phase.STANDBY)
                await load.publish(100)
                await done(store, load)


async def test_alone_a_slow_worker_goes_on_after_losing_its_pin(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load = Store(), Load(broker)
        slow = RecordingWorker(store)

        async def wait(batch: list[Delivered]) -> None:
            if slow.batches in (1, 2):
                await asyncio.sleep(PIN_TIMEOUT_SECONDS * 1.3)

        slow.before = wait
        async with reading(broker, slow):
            await load.publish(4000)
            await done(store, load)


async def test_two_readers_thrown_about_at_random_apply_everything_once(nats_server: NatsServer) -> None:
    dice = random.Random(7)
    async with (
        connected(nats_server.url) as one,
        connected(nats_server.url) as other,
        connected(nats_server.url) as publisher,
    ):
        await make_stream(publisher)
        store, load = Store(), Load(publisher)
        workers = [RecordingWorker(store), RecordingWorker(store)]

        async def sometimes(batch: list[Delivered]) -> None:
            roll = dice.random()
            if roll < 0.1:
                raise Unavailable("for a moment")
            if roll < 0.3:
                await asyncio.sleep(dice.random() * 0.2)

        for worker in workers:
            worker.before = sometimes
        async with reading(one, workers[0]), reading(other, workers[1]):
            for _ in range(60):
                await load.publish(dice.randint(0, 150))
                match dice.randint(0, 5):
                    case 0:
                        await publisher.api("CONSUMER.UNPIN.EV.reader", {"group": "owner"})
                    case 1:
                        await publisher.api("CONSUMER.RESET.EV.reader", {"seq": dice.randint(1, load.count + 20)})
                    case 2:
                        transport = outgoing(dice.choice([one, other]).nc)
                        assert transport is not None
                        transport.abort()
                    case 3:
                        await asyncio.sleep(dice.random() * 0.3)
            for worker in workers:
                worker.before = None
            await done(store, load)


@pytest.mark.timeout(120)
async def test_a_change_of_the_consumers_leader_costs_no_message(nats_cluster: NatsCluster) -> None:
    async with connected(nats_cluster.url) as broker, connected(nats_cluster.url) as publisher:
        await make_stream(broker, replicas=3)
        store, load = Store(), Load(publisher)
        async with reading(broker, RecordingWorker(store)):
            for step in range(4):
                await load.surely(20)
                name = "CONSUMER.LEADER.STEPDOWN.EV.reader" if step % 2 else "STREAM.LEADER.STEPDOWN.EV"
                await publisher.api(name)
                await load.surely(20)
            await done(store, load, seconds=30)


# --- messages that mean harm -------------------------------------------------------------------------------------------------


async def test_a_message_that_carries_a_pin_of_its_own_does_not_confuse_the_reader(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load = Store(), Load(broker)
        for _ in range(3):
            await broker.append("ev.0.one", b"%d" % load.count, {"Nats-Pin-Id": "forged", "Status": "423"})
            load.count += 1
        worker = RecordingWorker(store)
        async with reading(broker, worker):
            await load.publish(10)
            await done(store, load, seconds=5)
        assert worker.acquired == 1


async def test_large_messages_are_buffered_by_bytes_not_by_number(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        handled: list[int] = []
        buffered: list[int] = []

        class Worker(RecordingWorker):
            async def handle(self, batch: list[Delivered]) -> None:
                await asyncio.sleep(0.02)
                handled.extend(message.seq for message in batch)
                buffered.append(sum(len(message.payload) for message in (*batch, *reader._buffer)))

        for _ in range(80):
            await broker.append("ev.0.large", bytes(1_000_000))
        async with reading(broker, Worker(Store())) as reader:
            await eventually(lambda: len(handled) >= 80)
        assert handled == list(range(1, 81))
        assert max(buffered) <= 2 * BUFFERED_PULLS_MAX * PULL_BYTES
