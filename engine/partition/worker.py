"""What a partition reader and its worker know of each other: what is read, how it comes, what is asked of the worker."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import msgspec

from engine.broker.jetstream import Stored, StreamState


class Phase(enum.Enum):
    """Where a reader stands."""

    STANDBY = "standby"
    TAKING_OVER = "taking over"
    READING = "reading"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Source:
    """A partition of a stream and the durable consumer that reads it.

    `subject`: of the partition, with a wildcard at its end. The consumer may bring others, too: they are passed over.
    `sparse`: messages of others leave the stream by themselves, so that a beginning that has moved says nothing about ours.
    """

    stream: str
    consumer: str
    subject: str
    sparse: bool = False


class Delivered(msgspec.Struct, frozen=True, gc=False):
    """A message of the partition, in stream order. `time_nanoseconds` is when the stream stored it (Unix time)."""

    subject: bytes
    seq: int
    time_nanoseconds: int
    headers: bytes
    payload: bytes


def delivered(stored: Stored) -> Delivered:
    """A message that was read by itself, as a partition would bring it."""
    at = int(datetime.fromisoformat(stored.time).timestamp() * 1e9)
    return Delivered(stored.subject.encode(), stored.seq, at, stored.headers, stored.payload)


class Worker(Protocol):
    """What is done with a partition. It owns the position; the reader only obeys it."""

    async def acquire(self) -> int:
        """Take the partition over and say the sequence to read next.

        Raises:
            PartitionStopped: an operator has to decide. BrokerError or OSError: try again.
        """

    async def position(self) -> int:
        """The sequence to read next, without taking over."""

    def check(self, state: StreamState) -> None:
        """Is the stream, as its leader describes it now, the one the position counts in?

        Raises:
            PartitionStopped: it is another incarnation, or another stream of the worker's is.
        """

    async def pass_over(self, seq: int) -> None:
        """Move the position to `seq`: the partition has no message left up to there. Else age would trim past the position.

        It may be called again, and with a `seq` below the position, which changes nothing. A worker for which it is not worth
        a write does nothing (ADR 0015).

        Raises:
            StepDown, PartitionStopped, BrokerError: as `handle`.
        """

    async def handle(self, batch: list[Delivered]) -> None:
        """Apply a batch; returns when its effect and position are stored. Retries passing failures in place.

        Raises:
            StepDown: another owner has the partition. PartitionStopped: an operator has to decide.
        """
