"""BULK as a pager uses it: a page's event is appended once, found again, and watched until it is dispatched."""

from __future__ import annotations

from engine.broker.jetstream import After, Broker, StreamState
from engine.campaigns.states import Position
from engine.dispatch.source import BULK
from engine.log.incarnations import epoch_of, stream_of
from engine.log.marks import Mark
from engine.log.writer import read_mark
from seamark.protocol.cursor import Cursor
from seamark.protocol.subjects import log_stream, partition_of, stored_event

APPEND_SECONDS = 5.0
"""How long a page is tried. What is unknown then is settled by the next look."""


class Bulk:
    """Where pages go.

    Args:
        partitions: as the streams' metadata says.
    """

    def __init__(self, broker: Broker, partitions: int) -> None:
        self._broker = broker
        self._partitions = partitions

    async def state(self) -> StreamState:
        """BULK as its leader describes it.

        Raises:
            PartitionStopped: there is no such stream, or it has no epoch.
        """
        state = await stream_of(self._broker, BULK.stream)
        epoch_of(state)
        return state

    async def find(self, subject: str) -> int | None:
        """The sequence of the page with this subject; None where the leader, which may be a deposed one, shows none."""
        stored = await self._broker.leader_last(BULK.stream, self._stored(subject))
        return None if stored is None else stored.seq

    async def store(self, subject: str, payload: bytes, epoch: str) -> Position:
        """Append a page, unless there is one under its subject.

        Raises:
            ApiError: 10071 where there is one; whose it is says `find`. OtherIncarnation: BULK is another one.
            Unavailable, Unanswered: as `Broker.append`.
        """
        ack = await self._broker.append(
            subject, payload, after=After(BULK.stream, 0), epoch=epoch, budget_seconds=APPEND_SECONDS
        )
        return Position(epoch, ack.seq)

    async def home_mark(self, subject: str) -> Mark | None:
        """How far the partition of this page is dispatched."""
        partition = self._partition(subject)
        return (await read_mark(self._broker, BULK.marked(partition, partition))).mark

    async def heads(self) -> dict[str, str]:
        """The newest record of each log now, by partition; none of those that hold no record.

        Not the ends of the logs: marks lie there, which planners and projections do not read, and so do not pass by themselves.
        """
        heads = {}
        for partition in range(self._partitions):
            epoch = epoch_of(await stream_of(self._broker, log_stream(partition)))
            newest = await self._broker.leader_last(log_stream(partition), f"log.{partition}.>")
            if newest is not None:
                heads[str(partition)] = str(Cursor(epoch, newest.seq))
        return heads

    def _stored(self, subject: str) -> str:
        return stored_event(subject, self._partition(subject))

    def _partition(self, subject: str) -> int:
        _, tenant, key, _ = subject.split(".", 3)
        return partition_of(tenant, key, self._partitions)
