"""Which incarnation of a stream a stored position counts in, and what it means in the present one.

A stream that `seamark topology restore` has given a new epoch remembers whose numbering it continues (`seamark.restored`).
Marks and claims of those earlier incarnations are translated when they are read, by the pure functions here.

`nats stream restore` brings a stream's former epoch back with it, so epochs alone do not tell that a stream was put back to a
backup: what was stored since is lost, and its numbers are given out again, to other messages. Numbers and times tell that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

import msgspec

from engine.broker.answers import EPOCH_KEY, StreamState
from engine.broker.jetstream import Broker
from engine.broker.refusals import is_missing
from engine.errors import ApiError, PartitionStopped, TopologyError
from engine.log.marks import Mark, MarkedStream, PlacedMark
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.subjects import EVENTS_STREAM, JOBS_STREAM

RESTORED_KEY: Final = "seamark.restored"
"""`<epoch>.<last seq of the backup>` for each time a stream was restored from one, newest first, separated by blanks."""

RESTORES_REMEMBERED: Final = 16
"""Positions older than this many restores have to be named by the operator."""

CLOCKS: Final = timedelta(seconds=60)
"""How far the clocks of two servers may be apart: each message carries the time of its own stream's leader."""

ASK_AGAIN_SECONDS: Final = (0.25, 0.75)
"""A deposed leader may still answer for a moment, and shows the past: what would stop a partition is asked again."""

RESTORED: Final = (
    "It was restored from a backup: with the dispatchers stopped run "
    "`seamark topology restore {0}=<its last sequence in the backup>`"
)


# --- lineage -------------------------------------------------------------------------------------------------------------


def inherited(stream: StreamState) -> dict[str, int]:
    """The earlier incarnations whose numbering a stream continues, each with the last sequence that it shares."""
    shared: dict[str, int] = {}
    for epoch, seq in map(parse_cursor, stream.metadata.get(RESTORED_KEY, "").split()):
        shared.setdefault(epoch, min([seq, *shared.values()]))
    return shared


def restored_metadata(stream: StreamState, epoch: str, backup_last_seq: int | None = None) -> dict[str, str]:
    """The metadata of a stream once it is known to come from a backup, which ended there, and has the new `epoch`."""
    shared = stream.last_seq if backup_last_seq is None else min(stream.last_seq, backup_last_seq)
    lineage = [] if stream.epoch is None else [f"{stream.epoch}.{shared}"]
    lineage = [*lineage, *stream.metadata.get(RESTORED_KEY, "").split()][:RESTORES_REMEMBERED]
    return stream.metadata | ({RESTORED_KEY: " ".join(lineage)} if lineage else {}) | {EPOCH_KEY: epoch}


def continues(stream: StreamState, epoch: str | None) -> bool:
    """Is this the incarnation `epoch`, or a later one that was restored from its backup?"""
    return epoch is not None and (epoch == stream.epoch or epoch in inherited(stream))


def renumbered(mark: Mark, source: StreamState) -> Mark | None:
    """The mark as it counts in the present source; None when that is not known.

    After a restore the numbering is the old one up to the backup's last message. What came behind it is lost, and other
    messages have its numbers.
    """
    if mark.epoch == source.epoch:
        return mark
    shared = inherited(source).get(mark.epoch)
    return None if shared is None else msgspec.structs.replace(mark.up_to(shared), epoch=source.epoch or "")


def translated(
    placed: PlacedMark, part: int, source: StreamState, stream: StreamState, recorded: Mapping[str, str]
) -> Mark | None:
    """What a mark that lies in `stream` says in the present incarnations of both streams; None: it is the first one there.

    Args:
        part: the part of the source that it is the mark of, as the remedy names it.
        recorded: epochs of the streams as written down when they were made.

    Raises:
        PartitionStopped: a stream was made anew, or ends before the mark; an operator has to say where to go on.
    """
    repair, name = repair_of(source.name, part), source.name
    if placed.mark is None:
        # Marks outlive what they count: without one nothing that the source still holds was applied, unless the stream was
        # made anew. Of a source that has never held anything nothing was.
        if source.last_seq and not continues(stream, recorded.get(stream.name)):
            raise PartitionStopped(f"{stream.name} was re-created and holds no mark", repair)
        return None
    if not continues(stream, placed.mark.stream_epoch):
        raise PartitionStopped(f"{stream.name} is another incarnation than its mark says", repair)
    mark = renumbered(placed.mark, source)
    if mark is None:
        counts = f"its mark counts in {name} {placed.mark.epoch}"
        raise PartitionStopped(f"{counts}, which is not the present one ({source.epoch}) nor its backup", repair)
    if mark.seq > source.last_seq:
        detail = f"{name} ends at {source.last_seq}, before {mark.seq} that was dispatched"
        raise PartitionStopped(detail, RESTORED.format(name))
    return mark


def repair_of(source: str, part: int) -> str:
    """The remedy where an operator has to say at which message of a source to go on with this part of it."""
    of = place_of(source)
    named = f"{of}first, {of}last or {of}{part}=<sequence>"
    return f"With the dispatchers stopped run `seamark topology repair`. Name {named} there, with --at"


def place_of(source: str) -> str:
    """What stands before the positions of a source on the command line: nothing for EVENTS, else its name."""
    return "" if source == EVENTS_STREAM else f"{source}:"


def younger(part: int, source: str, placed: Mark, meant: Mark) -> PartitionStopped:
    """The error for an event that a mark covers but that was stored after the mark: it is not the event that was dispatched."""
    detail = f"event {meant.seq} of {source} is younger than the mark that says it was dispatched"
    at = f"`seamark topology repair --at {place_of(source)}{part}="
    if placed.epoch != meant.epoch:
        remedy = f"The backup ended earlier than you said. Name the last event of the backup: {at}<sequence>`"
    else:
        restored = RESTORED.format(source)
        remedy = f"{restored}. If it was not, the servers' clocks disagreed: name the position, {at}{meant.seq}`"
    return PartitionStopped(detail, remedy)


# --- asking the leaders, which raises ApiError, Unavailable and Unanswered as `Broker` does ---------------------------------


def missing(stream: str) -> PartitionStopped:
    """What to raise for a stream that is not there."""
    remedy = "Run `seamark topology apply`"
    if stream != JOBS_STREAM:  # what waited in a backup of JOBS was sent since
        remedy = "Restore it from a backup if it existed once, else run `seamark topology apply`"
    return PartitionStopped(f"there is no stream {stream}", remedy)


async def stream_of(broker: Broker, name: str) -> StreamState:
    """What the leader of a stream says of it, now.

    Raises:
        PartitionStopped: there is no such stream.
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
    """
    for pause in ASK_AGAIN_SECONDS:
        if state.last_seq >= seq:
            break
        await asyncio.sleep(pause)
        state = await stream_of(broker, state.name)
    return state


async def is_younger(broker: Broker, marked: MarkedStream, seq: int) -> bool:
    """Was what the source holds under `seq` stored after the mark that is said to cover it? Then it is another message.

    False where clocks leave a doubt, and where the source holds nothing there any more.
    """
    stored = await broker.leader_next(marked.source, ">", seq) if seq > 0 else None
    if stored is None or stored.seq != seq:
        return False
    placed = await broker.leader_last(marked.name, marked.subject)
    return placed is not None and datetime.fromisoformat(stored.time) > datetime.fromisoformat(placed.time) + CLOCKS
