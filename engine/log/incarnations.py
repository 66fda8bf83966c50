"""Streams that are not what they were: one that is gone, and one that was put back to a backup.

`nats stream restore` brings a stream's epoch back with it, so epochs alone do not tell: what was stored since the backup
is lost, and its numbers are given out again, to other messages. Whoever has a position beyond them would pass these over.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Final

from engine.broker.jetstream import Broker, StreamState
from engine.errors import ApiError, PartitionStopped, TopologyError
from engine.log.marks import Mark, MarkedStream
from seamark.protocol.subjects import EVENTS_STREAM

STREAM_MISSING: Final = 10059

CLOCKS: Final = timedelta(seconds=60)
"""How far the clocks of two servers may be apart: each message carries the time of its own stream's leader."""

ASK_AGAIN_SECONDS: Final = (0.25, 0.75)
"""A deposed leader may still answer for a moment, and shows the past: what would stop a partition is asked again."""

SOURCE_RESTORED: Final = (
    "It was restored from a backup: with the dispatchers stopped run "
    "`seamark topology restore {0}=<its last sequence in the backup>`, then `seamark topology repair`"
)


def is_missing(error: BaseException) -> bool:
    """Does the server say that there is no such stream?"""
    return isinstance(error, ApiError) and error.err_code == STREAM_MISSING


def missing(stream: str) -> PartitionStopped:
    """What to raise for a stream that is not there."""
    remedy = "Restore it from a backup if it existed once, else run `seamark topology apply`"
    return PartitionStopped(f"there is no stream {stream}", remedy)


async def stream_of(broker: Broker, name: str) -> StreamState:
    """What the leader of a stream says of it, now.

    Raises:
        PartitionStopped: there is no such stream. ApiError, Unavailable, Unanswered: as `Broker.stream`.
    """
    try:
        return await broker.stream(name)
    except ApiError as error:
        if is_missing(error):
            raise missing(name) from error
        raise


def epoch_of(state: StreamState) -> str:
    """The incarnation a stream is in.

    Raises:
        PartitionStopped: it has none, for it was not made by `seamark topology apply`.
    """
    if state.epoch is None:
        raise PartitionStopped(f"{state.name} has no epoch", "Run `seamark topology apply`")
    return state.epoch


async def read_partitions(broker: Broker, configured: int | None = None) -> int:
    """The number of partitions the streams were made for.

    Raises:
        TopologyError: no topology yet, or this process is configured for another number.
        ApiError, Unavailable, Unanswered: the leader of EVENTS cannot be asked.
    """
    state = await stream_of(broker, EVENTS_STREAM)
    if state.partitions is None or state.epoch is None:
        raise TopologyError("EVENTS was not made by the topology command", "Run `seamark topology apply`")
    if configured is not None and configured != state.partitions:
        raise TopologyError(
            f"SEAMARK_PARTITIONS is {configured}, the streams were made for {state.partitions}",
            "Unset it, for the number is fixed when streams are made, or connect to the servers it was meant for",
        )
    return state.partitions


async def reaching(broker: Broker, state: StreamState, seq: int) -> StreamState:
    """The stream as its leader describes it once it shows message `seq`; if it does not within a second, as it is then.

    `state` may be older than the position that says `seq`: whoever else works there is ahead of it.

    Raises:
        PartitionStopped, ApiError, Unavailable, Unanswered: as `stream_of`.
    """
    for pause in ASK_AGAIN_SECONDS:
        if state.last_seq >= seq:
            break
        await asyncio.sleep(pause)
        state = await stream_of(broker, state.name)
    return state


async def check_reach(broker: Broker, marked: MarkedStream, source: StreamState, mark: Mark | None) -> None:
    """Does the source still hold, as the same message, what a mark tells to be applied?

    Raises:
        PartitionStopped: it was put back to a backup without `seamark topology restore`. ApiError, Unavailable, Unanswered:
            a leader cannot be asked.
    """
    if mark is None or mark.epoch != source.epoch:
        return
    source, remedy = await reaching(broker, source, mark.seq), SOURCE_RESTORED.format(source.name)
    if mark.seq > source.last_seq:
        raise PartitionStopped(
            f"{source.name} ends at {source.last_seq}, before {mark.seq} that was dispatched", remedy
        )
    if await younger_than_mark(broker, marked, mark.seq):
        detail = f"message {mark.seq} of {source.name} is younger than the mark that tells it to be dispatched"
        raise PartitionStopped(detail, f"{remedy}. If it was not, the servers' clocks disagree: mend them, then repair")


async def younger_than_mark(broker: Broker, marked: MarkedStream, seq: int) -> bool:
    """Was what the source holds under `seq` stored after the mark that is said to cover it? Then it is another message.

    False where clocks leave a doubt, and where the source holds nothing there any more.

    Raises:
        ApiError, Unavailable, Unanswered: a leader cannot be asked.
    """
    stored = await broker.leader_next(marked.source, ">", seq) if seq > 0 else None
    if stored is None or stored.seq != seq:
        return False
    placed = await broker.leader_last(marked.name, marked.subject)
    return placed is not None and _time(stored.time) > _time(placed.time) + CLOCKS


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
