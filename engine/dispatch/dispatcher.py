"""The dispatcher: turns events into records of their users' logs, each exactly once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.cancels import Cancels, watching
from engine.controls.watching import WatchedControls
from engine.dispatch.absence import Absence
from engine.dispatch.claims import Claims
from engine.dispatch.due import DueWorker
from engine.dispatch.relay import relaying
from engine.dispatch.room import Shares
from engine.dispatch.source import EVENTS, SOURCES, EventSource
from engine.dispatch.turns import Turns
from engine.dispatch.worker import DispatchWorker
from engine.errors import BrokerError, PartitionStopped
from engine.limits import PIN_TIMEOUT_SECONDS
from engine.log.incarnations import read_partitions, stream_of
from engine.partition.head import read_pin_timeout
from engine.partition.reader import PartitionReader
from engine.tasks import run_until, together
from seamark.protocol.subjects import LATER_STREAM, log_stream

_log = structlog.get_logger("seamark.dispatcher")

EPOCH_WATCH_SECONDS = 5.0


class Dispatcher:
    """All partitions of all sources in one process; each is worked on while this process holds its pin.

    Args:
        partitions: as the streams' metadata says; see `read_partitions`.
        sources: where events come from.
        cancels: which transactions are cancelled; None: none is.
        controls: while a source's lane is paused, nothing of it is dispatched.
        shares: how much each tenant has put off; None: it is not counted.
    """

    def __init__(
        self,
        broker: Broker,
        claims: Claims,
        partitions: int,
        *,
        sources: Sequence[EventSource] = SOURCES,
        cancels: Cancels | None = None,
        controls: WatchedControls | None = None,
        shares: Shares | None = None,
        pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS,
    ) -> None:
        self._broker = broker
        self._claims, self._shares = claims, shares
        named = (*(source.stream for source in sources), LATER_STREAM, *map(log_stream, range(partitions)))
        self._streams = list(dict.fromkeys(named))
        turns = Turns()
        self._workers = [
            (DueWorker if source.due else DispatchWorker)(
                broker, claims, q, partitions, source, turns, cancels, controls, shares
            )
            for source in sources
            for q in range(partitions)
        ]
        self.readers = [
            PartitionReader(broker, worker.reads, worker, pin_timeout_seconds=pin_timeout_seconds)
            for worker in self._workers
        ]

    async def run(self) -> None:
        """Work until cancelled; the first partition to fail in a way nobody foresaw ends all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._claims.watch(), name="claims-watch")
                tasks.create_task(self._watch_epochs(), name="epoch-watch")
                for worker, reader in zip(self._workers, self.readers, strict=True):
                    tasks.create_task(reader.run(), name=f"dispatch {worker.name}")
                    tasks.create_task(worker.burials.tend(reader), name=f"bury {worker.name}")
        finally:
            await self._claims.close()
            if self._shares is not None:
                await self._shares.close()

    async def _watch_epochs(self) -> None:
        """A stream restored or re-created under a running dispatcher: positions have to be read, and translated, anew."""
        while True:
            await asyncio.sleep(EPOCH_WATCH_SECONDS)
            noted = [worker.streams for worker in self._workers]
            # One that is missing or has no leader says nothing about the others.
            now: dict[str, str | None] = {}
            for name in self._streams:
                try:
                    now[name] = (await stream_of(self._broker, name)).epoch
                except PartitionStopped:
                    now[name] = None
                except BrokerError as error:
                    _log.debug("epoch_not_read", stream=name, error=type(error).__name__)
            for worker, reader, streams in zip(self._workers, self.readers, noted, strict=True):
                # Who has begun anew meanwhile may know more than was read here.
                if worker.streams is streams and worker.changed(now):
                    reader.take_over_again()


async def run(
    broker: Broker,
    redis: Redis,
    *,
    partitions: int | None = None,
    controls: WatchedControls | None = None,
    stop: asyncio.Event,
) -> None:
    """Dispatch until `stop` is set; a batch that is in flight then is settled by whoever reads its mark next.

    Raises:
        TopologyError: see `read_partitions`.
    """
    count = await read_partitions(broker, partitions)
    pin_timeout = await read_pin_timeout(broker, EVENTS.partition(0))
    async with relaying(broker.settings, count), watching(broker) as cancels:
        work = Dispatcher(
            broker,
            Claims(redis),
            count,
            cancels=cancels,
            controls=controls,
            shares=Shares(redis),
            pin_timeout_seconds=pin_timeout,
        )
        works = {"dispatch": work.run(), "absence": Absence(broker, redis).watch()}
        await run_until(stop, together(works), name="dispatcher")
