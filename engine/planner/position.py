"""Where planning stands: a mark in JOBS for each log. It is never guessed, for what is planned twice may be sent twice.

JOBS has no backup: what waits in it was sent meanwhile. One that is lost is made anew by `seamark topology apply`, with marks at
the ends of the logs: what is older is not planned any more.
"""

from __future__ import annotations

import secrets
import time
from typing import Final

from engine.broker.jetstream import Broker, StreamState
from engine.errors import PartitionStopped
from engine.log.incarnations import RESTORED, epoch_of, is_younger, reaching, renumbered
from engine.log.marks import Mark, MarkedStream, PlacedMark
from engine.partition.worker import Source
from seamark.protocol.subjects import JOBS_STREAM, log_stream, plan_consumer, plan_mark_subject

APPLY: Final = "Run `seamark topology apply`: it sets the mark to the end of the log, and nothing older is planned"
ANEW: Final = (
    "Delete JOBS (nats stream rm JOBS), then run `seamark topology apply`: it sets the marks to the ends of the logs"
)
REPAIR: Final = "With the dispatchers stopped run `seamark topology repair`: it sets the mark to the end of the log"


def source(partition: int) -> Source:
    """What the planner of a partition reads."""
    return Source(log_stream(partition), plan_consumer(partition), f"log.{partition}.>")


def marked(partition: int) -> MarkedStream:
    """JOBS as it is written from one log. It keeps messages for ever, so only the newest mark stays."""
    return MarkedStream(log_stream(partition), JOBS_STREAM, plan_mark_subject(partition), rollup=True)


def at_the_end(log: StreamState, jobs: StreamState, term: int = 0) -> Mark:
    """A mark behind everything that a log holds.

    Its term is the time, or the one above `term` if that is more: whoever plans the same notification after JOBS was made
    anew has the higher term, too.
    """
    newest = max(term + 1, int(time.time()))
    return Mark(epoch_of(log), log.last_seq, newest, f"topology-{secrets.token_hex(4)}", epoch_of(jobs))


def meant(placed: PlacedMark, log: StreamState, jobs: StreamState) -> Mark:
    """What a planner's mark says in the present incarnation of its log.

    Raises:
        PartitionStopped: JOBS or the log is not the one it was written for; an operator has to say where to go on.
    """
    mark = placed.mark
    if mark is None:
        raise PartitionStopped(f"JOBS holds no mark for {log.name}", APPLY)
    if mark.stream_epoch != jobs.epoch:
        raise PartitionStopped(f"JOBS is another incarnation than its mark for {log.name} says", ANEW)
    now = renumbered(mark, log)
    if now is None:
        detail = f"{log.name} was planned up to {mark.seq} of incarnation {mark.epoch}, which is not the present one"
        raise PartitionStopped(f"{detail} ({log.epoch}) nor its backup", REPAIR)
    if now.seq > log.last_seq:
        detail = f"{log.name} ends at {log.last_seq}, before record {now.seq} that was planned"
        raise PartitionStopped(detail, RESTORED.format(log.name))
    return now


async def read_meant(broker: Broker, partition: int, placed: PlacedMark, log: StreamState, jobs: StreamState) -> Mark:
    """The same, where the leader of the log may not show everything yet, or the log was put back to a backup in silence.

    Raises:
        PartitionStopped: as `meant`; also where the record that was planned last is younger than its mark.
    """
    if placed.mark is not None and placed.mark.epoch == log.epoch:
        log = await reaching(broker, log, placed.mark.seq)
    mark = meant(placed, log, jobs)
    if await is_younger(broker, marked(partition), mark.seq):
        detail = f"record {mark.seq} of {log.name} is younger than the mark that says it was planned"
        raise PartitionStopped(detail, f"{RESTORED.format(log.name)}. If it was not, the servers' clocks disagreed")
    return mark


def repaired(placed: PlacedMark, log: StreamState, jobs: StreamState) -> Mark | None:
    """The mark that has to take the place of one whose log was made anew; None where it needs none.

    Raises:
        PartitionStopped: a repair is not what it needs.
    """
    if placed.mark is not None and placed.mark.stream_epoch == jobs.epoch and renumbered(placed.mark, log) is None:
        return at_the_end(log, jobs, placed.mark.term)
    meant(placed, log, jobs)
    return None
