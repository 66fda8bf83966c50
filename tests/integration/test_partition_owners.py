"""Two readers of one partition on a real server: one owns it, and whoever takes over, every message is applied once."""

import asyncio
import random

import pytest

from engine.broker.client import outgoing
from engine.errors import Unavailable
from engine.limits import BUFFERED_PULLS_MAX, PIN_TIMEOUT_SECONDS, PULL_BATCH
from engine.partition.reader import Delivered, Phase
from ops.dev.servers import NatsServer
from tests.support.logs import connected, eventually
from tests.support.network import bad_network
from tests.support.overlays import QUICK_DISK
from tests.support.partitions import PIN_TIMEOUT_SECONDS as SHORT_PIN_SECONDS
from tests.support.partitions import Load, RecordingWorker, Store, done, make_stream, reading

pytestmark = pytest.mark.overlay(QUICK_DISK)

SHIPPED = {"pin_timeout_seconds": PIN_TIMEOUT_SECONDS}
"""For a stream and its readers: a pause of this process must not cost the pin before, or after, the test wants that."""


async def test_a_standby_takes_over_from_an_owner_that_vanished_and_is_not_disturbed_when_it_comes_back(
    nats_server: NatsServer,
) -> None:
    async with (
        bad_network(nats_server.port) as network,
        connected(f"nats://127.0.0.1:{network.port}") as far,
        connected(nats_server.url) as near,
        connected(nats_server.url) as publisher,
    ):
        await make_stream(publisher, **SHIPPED)
        store, load = Store(), Load(publisher)
        vanishing = RecordingWorker(store)
        held = asyncio.Event()
        async with reading(far, vanishing, **SHIPPED) as first:
            await load.publish(100)
            await done(store, load)
            # It takes over by the pin, not because a partition that stays quiet is looked at.
            async with reading(near, RecordingWorker(store), **SHIPPED, quiet_seconds=600) as second:

                async def hold(batch: list[Delivered]) -> None:
                    await held.wait()

                # It vanishes with messages in hand that it never applies: the reading head is beyond the position.
                vanishing.before = hold
                await load.publish(2500)
                await eventually(lambda: vanishing.batches > 1 and first._buffer)
                network.cut()
                await done(store, load)
                await eventually(lambda: second.phase is Phase.READING)
                network.restore()
                held.set()
                vanishing.before = None
                await eventually(lambda: far.connected)
                await load.publish(500)
                await done(store, load)
                await eventually(lambda: first.phase is Phase.STANDBY)


async def test_a_slow_worker_loses_its_pin_with_a_bounded_buffer_and_steps_down(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as one, connected(nats_server.url) as other:
        await make_stream(one, **SHIPPED)
        store, load = Store(), Load(other)
        slow = RecordingWorker(store)
        go_on = asyncio.Event()

        async def wait(batch: list[Delivered]) -> None:
            await go_on.wait()

        slow.before = wait
        async with reading(one, slow, **SHIPPED) as first:
            await load.publish(1)
            await eventually(lambda: slow.batches == 1)
            await load.publish(5000)
            await eventually(lambda: len(first._buffer) > PULL_BATCH)
            async with reading(other, RecordingWorker(store), **SHIPPED):
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
                await asyncio.sleep(SHORT_PIN_SECONDS * 1.3)

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
                        if transport := outgoing(dice.choice([one, other]).nc):  # None: it is not back yet
                            transport.abort()
                    case 3:
                        await asyncio.sleep(dice.random() * 0.3)
            for worker in workers:
                worker.before = None
            await done(store, load)
