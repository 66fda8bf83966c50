"""Projectors for tests, in the test's own loop or as processes, and the fold of a whole log to hold them against."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path

from chaos.load import whole_stream
from engine.broker.jetstream import Broker, Stored
from engine.partition.reader import Delivered
from projections.projector import Projector, projections
from seamark.protocol.subjects import log_stream
from tests.support.logs import PIN_TIMEOUT_SECONDS, at_work, connected, redis_at
from tests.support.roles import RoleProcess

PARTITIONS = 4


@contextlib.asynccontextmanager
async def projecting(url: str, redis_url: str, partitions: int = PARTITIONS) -> AsyncIterator[Projector]:
    """A projector at work on connections of its own; a fault of it fails the test."""
    async with connected(url) as broker, redis_at(redis_url) as redis:
        projector = Projector(broker, projections(redis, None), partitions, pin_timeout_seconds=PIN_TIMEOUT_SECONDS)
        async with at_work(projector.run(), "projector"):
            yield projector


class ProjectorProcess(RoleProcess):
    """One projector process, as the command starts it."""

    def __init__(self, name: str, folder: Path, nats_url: str, redis_url: str) -> None:
        super().__init__(name, folder, nats_url)
        self.redis_url = redis_url

    def command(self) -> list[str]:
        return ["ops", "projector"]

    def settings(self) -> dict[str, str]:
        return {"SEAMARK_REDIS_URL": self.redis_url}


@contextlib.contextmanager
def projector_processes(
    folder: Path, nats_url: str, redis_url: str, count: int = 2
) -> Iterator[list[ProjectorProcess]]:
    """Projectors, not started, that are killed at the end."""
    processes = [ProjectorProcess(f"projector-{i}", folder, nats_url, redis_url) for i in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


async def log_of(broker: Broker, partition: int) -> list[Delivered]:
    """Every record of a partition, in order."""
    return [delivered(one) for one in await whole_stream(broker, log_stream(partition), f"log.{partition}.>")]


def delivered(one: Stored) -> Delivered:
    """A stored message, as a reader is handed it."""
    at = round(datetime.fromisoformat(one.time).timestamp() * 1e9)
    return Delivered(one.subject.encode(), one.seq, at, one.headers, one.payload)
