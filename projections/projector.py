"""The projector role: every partition of every projection, each read by one process while the others stand by."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.log.incarnations import read_partitions
from engine.partition.head import read_pin_timeout
from engine.partition.reader import PartitionReader
from engine.postgres import Pool
from engine.tasks import run_until
from projections.erasure import Eraser
from projections.funnel import counts as funnel
from projections.funnel.cohorts import folded_until
from projections.postgres.store import TableStore
from projections.projection import UNREAD, Projection
from projections.retention.months import Months
from projections.runner import ProjectionWorker
from projections.stores import STORES
from projections.unread.worker import UnreadWorker

Worker = Callable[[Broker, int], ProjectionWorker]
"""Makes what folds a partition."""


def projections(redis: Redis, pool: Pool | None) -> list[tuple[Projection, Worker]]:
    """Everything a projector folds. Without PostgreSQL (`pool` None) only what lives in Redis."""
    folds: list[tuple[Projection, Worker]] = [(UNREAD, lambda broker, p: UnreadWorker(broker, p, redis))]
    if pool is not None:
        folds += [(store.projection, functools.partial(_table_worker, pool, store)) for store in STORES.values()]
    return folds


def _table_worker(pool: Pool, store: type[TableStore], broker: Broker, p: int) -> ProjectionWorker:
    return ProjectionWorker(broker, store.projection, p, store(pool, p))


class Projector:
    """Reads all partitions of all projections, as far as this process is the one chosen for them.

    Args:
        folds: what is folded.
        pin_timeout_seconds: silence after which a standby is chosen; None: as the consumers are configured.
    """

    def __init__(
        self,
        broker: Broker,
        folds: list[tuple[Projection, Worker]],
        partitions: int,
        *,
        pin_timeout_seconds: float | None = None,
    ) -> None:
        self._broker = broker
        self._folds = folds
        self.partitions = partitions
        self._pin_timeout_seconds = pin_timeout_seconds
        self.readers: list[PartitionReader] = []

    async def run(self) -> None:
        """Fold for ever; ends by cancellation.

        Raises:
            TopologyError: a consumer is missing.
        """
        async with asyncio.TaskGroup() as tasks:
            for projection, make in self._folds:
                timeout = self._pin_timeout_seconds or await read_pin_timeout(self._broker, projection.source(0))
                for p in range(self.partitions):
                    worker, source = make(self._broker, p), projection.source(p)
                    reader = PartitionReader(self._broker, source, worker, pin_timeout_seconds=timeout)
                    self.readers.append(reader)
                    tasks.create_task(reader.run(), name=f"read {source.consumer}")
                    tasks.create_task(worker.watch_lag(reader), name=f"watch the lag of {source.consumer}")
                    tasks.create_task(worker.tend(reader), name=f"tend {source.consumer}")


async def run(
    broker: Broker, redis: Redis, pool: Pool | None, *, partitions: int | None = None, stop: asyncio.Event
) -> None:
    """Fold until `stop` is set.

    Raises:
        TopologyError: no topology, another number of partitions than configured, or a consumer is missing.
    """
    work = Projector(broker, projections(redis, pool), await read_partitions(broker, partitions))

    async def fold() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work.run(), name="folds")
            if pool is not None:
                folded = functools.partial(folded_until, broker, pool, work.partitions)
                tasks.create_task(funnel.export(pool, folded), name="funnel")
                tasks.create_task(Months(broker, redis, pool, work.partitions).run(), name="months")
                tasks.create_task(Eraser(broker, redis, pool, work.partitions).run(), name="erasure")

    await run_until(stop, fold(), name="projector")
