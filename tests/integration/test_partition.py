"""The partition reader on a real server: whatever happens, its worker sees every message once, in order, by its position."""

import asyncio
import contextlib
import random
import time

import pytest
from prometheus_client import REGISTRY

from engine.broker.client import outgoing
from engine.broker.jetstream import Broker
from engine.errors import ApiError, BrokerError, PartitionStopped, Unavailable
from engine.limits import BUFFERED_PULLS_MAX, PULL_BYTES
from engine.partition import head
from engine.partition import reader as partition
from engine.partition.reader import Delivered, PartitionReader, Phase
from ops.dev.servers import NatsCluster, NatsServer
from tests.support.logs import PIN_KEPT_SECONDS, connected, eventually
from tests.support.overlays import QUICK_DISK
from tests.support.partitions import (
    SOURCE,
    Load,
    RecordingWorker,
    Store,
    done,
    make_consumer,
    make_stream,
    reading,
)
from tests.support.waiting import ended

pytestmark = pytest.mark.overlay(QUICK_DISK)

KEPT = {"pin_timeout_seconds": PIN_KEPT_SECONDS}
"""For a stream and its readers: no pin is lost but by what the test does itself, however slow the machine is."""


@pytest.fixture(autouse=True)
def pins_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the broker answers late: the next reader would wait for the pin's time-out."""
    monkeypatch.setattr(head, "GIVE_BACK_SECONDS", 20.0)


# --- the straight way ------------------------------------------------------------------------------------------------------


async def test_every_message_of_the_partition_is_handled_once_in_order(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker, **KEPT)
        store, load = Store(), Load(broker)
        await load.publish(2000)
        worker = RecordingWorker(store)
        async with reading(broker, worker, **KEPT) as reader:
            await load.publish(2000)
            await done(store, load)
            for _ in range(20):
                await load.publish(1)
                await done(store, load)
            assert reader.phase is Phase.READING
        assert worker.acquired == 1


async def test_what_a_consumer_without_a_filter_brings_of_others_is_passed_over(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker, **KEPT)
        store, load = Store(), Load(broker)
        worker = RecordingWorker(store)
        await load.others(3)
        await load.publish(1000)
        async with reading(broker, worker, **KEPT):
            await done(store, load)
            # A reader that is at work need not notice that the filter goes.
            await make_consumer(broker, subject=">", **KEPT)
            await load.publish(1000)
            await done(store, load)
        await load.others(3)
        await load.publish(1000)
        async with reading(broker, worker, **KEPT):
            await done(store, load)
        assert worker.acquired == 2


async def test_reading_starts_at_the_workers_position_not_at_the_consumers(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load = Store(), Load(broker)
        await load.publish(1000)
        last = await load.others(1)
        # The consumer's head stands at the end; nothing comes by itself, and nobody has applied anything.
        await broker.api("CONSUMER.RESET.EV.reader", {"seq": last + 1})
        async with reading(broker, RecordingWorker(store)):
            await done(store, load)


async def test_a_reader_that_ends_gives_its_pin_back_and_the_standby_goes_on_at_once(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as one, connected(nats_server.url) as other:
        await make_stream(one, **KEPT)
        store, load = Store(), Load(one)
        async with contextlib.AsyncExitStack() as first:
            owner = await first.enter_async_context(reading(one, RecordingWorker(store), **KEPT))
            await load.publish(100)
            await done(store, load)
            async with reading(other, RecordingWorker(store), **KEPT) as standby:
                await waits_for_the_pin(other, standby)
                assert (owner.phase, standby.phase) == (Phase.READING, Phase.STANDBY)
                await first.aclose()
                await load.publish(100)
                await done(store, load)
                assert standby.phase is Phase.READING
        assert len(one.nc._subs) == len(one.nc.parser.handlers)


async def waits_for_the_pin(broker: Broker, reader: PartitionReader) -> None:
    await eventually(lambda: reader._pulls.outstanding)
    await broker.flush()


async def test_a_reader_that_lost_its_pin_without_a_word_takes_nobody_elses_when_it_ends(
    nats_server: NatsServer,
) -> None:
    async with connected(nats_server.url) as one, connected(nats_server.url) as other:
        await make_stream(one, **KEPT)
        store, load = Store(), Load(one)
        worker = RecordingWorker(store)
        async with reading(other, worker, **KEPT) as owner:
            await load.publish(1)
            await done(store, load)
            async with reading(one, RecordingWorker(store), **KEPT) as former:
                await waits_for_the_pin(one, former)
                former._pin = b"of before"
            await load.publish(1)
            await done(store, load)
            assert owner.phase is Phase.READING
            assert worker.acquired == 1


async def test_a_reader_ends_though_what_it_asks_for_its_position_swallows_that(nats_server: NatsServer) -> None:
    class Swallowing(RecordingWorker):
        """Its store's client loses a cancellation in the midst of a call, as redis-py does."""

        async def position(self) -> int:
            asked.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            return await super().position()

    asked = asyncio.Event()
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        reader = PartitionReader(broker, SOURCE, Swallowing(Store()), **KEPT)
        task = asyncio.create_task(reader.run(), name="reader")
        async with asyncio.timeout(30):
            await asked.wait()  # nothing comes and nobody is chosen: a standby looks whether anything is left
        await ended(task)


async def test_a_reader_that_ends_while_disconnected_leaves_no_subscription_behind(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        subscriptions, callbacks = set(broker.nc._subs), list(broker.on_reconnect)
        async with reading(broker, RecordingWorker(Store())):
            nats_server.kill()
            await eventually(lambda: not broker.connected)
        assert set(broker.nc._subs) == subscriptions
        assert broker.on_reconnect == callbacks
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
            await done(store, load)


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
        store, load, dice = Store(), Load(other), random.Random(7)
        async with reading(broker, RecordingWorker(store)):
            for _ in range(20):
                await load.publish(200)
                await other.api("CONSUMER.RESET.EV.reader", {"seq": dice.randint(1, load.count)})
                await load.publish(200)
            await done(store, load)
            # Also when nothing follows that would show the gap.
            last = (await other.stream("EV")).last_seq
            await other.api("CONSUMER.RESET.EV.reader", {"seq": last + 10})
            await load.publish(5)
            await done(store, load)


async def test_a_late_reset_after_an_idle_take_over_stalls_nothing_though_messages_keep_coming(
    nats_server: NatsServer,
) -> None:
    async with connected(nats_server.url) as broker, connected(nats_server.url) as other:
        await make_stream(broker, **KEPT)
        store, load = Store(), Load(other)
        async with reading(broker, RecordingWorker(store), **KEPT):
            await load.publish(100)
            await done(store, load)
        await other.api("CONSUMER.RESET.EV.reader", {"seq": 1})  # has a reader chosen: there is something to read
        worker = RecordingWorker(store)
        async with reading(broker, worker, **KEPT, quiet_seconds=1.0) as reader:
            await eventually(lambda: reader.phase is Phase.READING and not reader._doubt)
            # It waits for the first message behind its position, and somebody's RESET from before arrives.
            await other.api("CONSUMER.RESET.EV.reader", {"seq": 5})

            async def arrived() -> bool:
                await load.publish(1)
                return len(store.applied) > 110

            await eventually(arrived, every_seconds=0.05)
            await done(store, load)
        assert worker.acquired == 1


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
            await done(store, load)


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

                async def stepped_down(name: str = name) -> bool:
                    with contextlib.suppress(BrokerError):  # there may be no leader just now
                        await publisher.api(name)
                        return True
                    return False

                await eventually(stepped_down, every_seconds=0.2)
                await load.surely(20)
            await done(store, load)


# --- messages that mean harm -------------------------------------------------------------------------------------------------


async def test_a_message_that_carries_a_pin_of_its_own_does_not_confuse_the_reader(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker, **KEPT)
        store, load = Store(), Load(broker)
        for _ in range(3):
            await broker.append("ev.0.one", b"%d" % load.count, {"Nats-Pin-Id": "forged", "Status": "423"})
            load.count += 1
        worker = RecordingWorker(store)
        async with reading(broker, worker, **KEPT):
            await load.publish(10)
            await done(store, load)
        assert worker.acquired == 1


async def test_large_messages_are_buffered_by_bytes_not_by_number(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await make_stream(broker, **KEPT)
        handled: list[int] = []
        buffered: list[int] = []

        class Worker(RecordingWorker):
            async def handle(self, batch: list[Delivered]) -> None:
                await asyncio.sleep(0.02)
                handled.extend(message.seq for message in batch)
                buffered.append(sum(len(message.payload) for message in (*batch, *reader._buffer)))

        for _ in range(80):
            await broker.append("ev.0.large", bytes(1_000_000))
        async with reading(broker, Worker(Store()), **KEPT) as reader:
            await eventually(lambda: len(handled) >= 80)
        assert handled == list(range(1, 81))
        assert max(buffered) <= 2 * BUFFERED_PULLS_MAX * PULL_BYTES


# --- what was trimmed ------------------------------------------------------------------------------------------------------


def possibly_trimmed() -> float:
    value = REGISTRY.get_sample_value(
        "seamark_partition_possibly_trimmed_total", {"stream": SOURCE.stream, "consumer": SOURCE.consumer}
    )
    return value or 0.0


async def test_messages_of_others_that_age_has_trimmed_are_no_alarm_and_own_ones_are(
    nats_server: NatsServer, monkeypatch
) -> None:
    monkeypatch.setattr(partition, "CLOCKS_SECONDS", 0.0)
    async with connected(nats_server.url) as broker:
        await make_stream(broker, **KEPT)
        store, load, before = Store(), Load(broker), possibly_trimmed()
        async with reading(broker, RecordingWorker(store), **KEPT, quiet_seconds=0.5) as reader:
            await load.publish(1)
            await done(store, load)
            at = await load.others(20)
            stored_at = time.time()
            await eventually(lambda: reader._clear_at > stored_at)  # it has seen that nothing of its own waits
            await broker.api("STREAM.PURGE.EV", {"seq": at})
            reader.suspect()
            await eventually(lambda: not reader._doubt)
            assert possibly_trimmed() == before, "nothing of this partition was trimmed"
        # While nobody reads, everything goes: it cannot be known whose it was, so it is said.
        await broker.append("ev.0.one", b"lost")
        await broker.api("STREAM.PURGE.EV")
        async with reading(broker, RecordingWorker(store), **KEPT):
            await load.publish(1)
            await done(store, load)
            assert possibly_trimmed() > before


async def test_a_partition_that_was_idle_for_longer_than_messages_are_kept_is_taken_over_without_an_alarm(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "CLOCKS_SECONDS", 0.0)
    monkeypatch.setattr(partition, "KEEP_POSITION_SECONDS", 0.1)
    async with connected(nats_server.url) as broker:
        await make_stream(broker)
        store, load, before = Store(), Load(broker), possibly_trimmed()
        async with reading(broker, RecordingWorker(store)):
            await load.publish(1)
            await done(store, load)
            last = await load.others(20)
            await eventually(lambda: store.next_seq == last + 1)
        await broker.api("STREAM.PURGE.EV")
        async with reading(broker, RecordingWorker(store)):
            await load.publish(1)
            await done(store, load)
        assert possibly_trimmed() == before


async def test_a_reader_goes_on_from_the_position_it_kept_while_nothing_came(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "KEEP_POSITION_SECONDS", 0.1)
    async with connected(nats_server.url) as broker:
        await make_stream(broker, **KEPT)
        store, load = Store(), Load(broker)
        async with reading(broker, RecordingWorker(store), **KEPT, quiet_seconds=0.5) as reader:
            await load.publish(1)
            await done(store, load)
            last = await load.others(20)
            await eventually(lambda: store.next_seq == last + 1)
            heads, put = [], reader._head.put

            async def noted(seq: int) -> None:
                heads.append(seq)
                await put(seq)

            monkeypatch.setattr(reader._head, "put", noted)
            reader.suspect()
            await eventually(lambda: heads)
            assert heads == [last + 1]
            await load.publish(3)
            await done(store, load)
