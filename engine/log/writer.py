"""Appending to one LOG for one event partition: the chain of marks, held against stale owners and lost answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from engine import failpoints, metrics
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, Broker, Outgoing
from engine.errors import ApiError, BrokerError, PartitionStopped, StepDown, Unanswered
from engine.log.incarnations import is_missing, missing, reaching, stream_of
from engine.log.marks import NO_MARK, Mark, PlacedMark, Verdict, decode_mark, encode_mark, settle
from engine.log.stalls import Stall
from seamark.backoff import Backoff
from seamark.protocol.subjects import log_stream, mark_subject

RETRY_SECONDS_MIN = 0.02
RETRY_SECONDS_MAX = 1.0


class Overtaken(BrokerError):
    """An older owner wrote between my claim and my batch: read every position again."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """One acquisition of an event partition. `events_epoch` is the incarnation of EVENTS its positions belong to."""

    term: int
    owner: str
    events_epoch: str


async def read_mark(broker: Broker, partition: int, event_partition: int) -> PlacedMark:
    """The mark of an event partition as the LOG's leader shows it.

    Raises:
        PartitionStopped: somebody wrote something else there, or there is no such stream.
    """
    stream, subject = log_stream(partition), mark_subject(partition, event_partition)
    try:
        stored = await broker.leader_last(stream, subject)
    except ApiError as error:
        if is_missing(error):
            raise missing(stream) from error
        raise
    if stored is None:
        return NO_MARK
    try:
        return PlacedMark(stored.seq, decode_mark(stored.payload))
    except msgspec.DecodeError as error:
        remedy = f"Delete message {stored.seq} of {stream}: the mark before it counts then"
        raise PartitionStopped(f"what {subject} holds is not a mark ({error})", remedy) from error


class LogWriter:
    """Appends batches of one event partition to one LOG, each ended by a mark that must follow the one before.

    Made by `claim`. One batch is in flight at a time.
    """

    def __init__(
        self,
        broker: Broker,
        partition: int,
        event_partition: int,
        ownership: Ownership,
        log_epoch: str,
        placed: PlacedMark,
    ) -> None:
        self._broker = broker
        self._partition = partition
        self._subject = mark_subject(partition, event_partition)
        self._stream = log_stream(partition)
        self._event_partition = event_partition
        self._ownership = ownership
        self._log_epoch = log_epoch
        self._placed = placed

    @classmethod
    async def claim(
        cls,
        broker: Broker,
        partition: int,
        event_partition: int,
        ownership: Ownership,
        *,
        log_epoch: str,
        found: PlacedMark,
        mark: Mark | None,
        start_seq: int,
    ) -> LogWriter:
        """Write the mark again under this ownership: from then on every older owner's batch is refused.

        Args:
            found: the mark as the leader showed it.
            mark: what it says in the present incarnations, see `incarnations.translated`.
            start_seq: the position where there is no mark yet.

        Raises:
            StepDown: a newer owner is there.
        """
        if found.mark is not None and found.mark.term >= ownership.term:
            raise StepDown(f"{log_stream(partition)} is marked by an owner of term {found.mark.term}")
        writer = cls(broker, partition, event_partition, ownership, log_epoch, found)
        if mark is None:
            await writer.append([], start_seq)
        else:
            await writer.append([], mark.seq, mark.user, unburied=mark.unburied)
        return writer

    @property
    def mark(self) -> Mark:
        """The last mark this owner wrote."""
        assert self._placed.mark is not None
        return self._placed.mark

    async def append(
        self, messages: list[Outgoing], seq: int, user: str | None = None, *, unburied: int | None = None
    ) -> None:
        """Store the messages and the position (see `Mark`), whatever it takes; returns when they are.

        Raises:
            StepDown: a newer owner took over, or the LOG has another epoch. Overtaken: an older owner got in between.
            PartitionStopped: the LOG was put back to a backup, and nobody has said so.
        """
        own = self._ownership
        mark = Mark(own.events_epoch, seq, own.term, own.owner, self._log_epoch, user, unburied)
        payload = encode_mark(mark)
        stall, backoff = Stall(self._stream), Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX, jitter=0.5)
        try:
            while True:
                expect = b"Nats-Expected-Last-Subject-Sequence: %d\r\n" % self._placed.log_seq
                try:
                    if messages:
                        failpoints.reach("before-append")
                    ack = await self._broker.commit([*messages, Outgoing(self._subject, payload, expect)])
                    failpoints.reach("after-commit-before-answer")
                    self._placed = PlacedMark(ack.seq, mark)
                    return
                except BrokerError as error:
                    metrics.append_retries.labels(_reason(error)).inc()
                    settled = not isinstance(error, ApiError) or error.err_code == WRONG_LAST_SEQUENCE
                    stall.report(error)
                if settled and await self._settle(mark, stall):
                    return
                await asyncio.sleep(backoff.next_seconds())
        finally:
            stall.over()

    async def _settle(self, sent: Mark, stall: Stall) -> bool:
        """Is the unconfirmed batch stored? False: it is to be sent again."""
        while True:
            try:
                found = await read_mark(self._broker, self._partition, self._event_partition)
                verdict = settle(sent, self._placed, found)
                if verdict in (Verdict.GONE, Verdict.ASK_AGAIN):
                    await self._check_epoch()
            except BrokerError as error:
                stall.report(error)
                await asyncio.sleep(RETRY_SECONDS_MAX / 4)
                continue
            if verdict is Verdict.COMMITTED:
                self._placed = found
                return True
            if verdict is Verdict.SEND_AGAIN:
                return False
            if verdict in (Verdict.GONE, Verdict.FOLLOW):
                self._placed = found
                return False
            if verdict is Verdict.STEP_DOWN:
                raise StepDown(f"{self._stream} was taken over by another owner")
            if verdict is Verdict.CLAIM:
                raise Overtaken(f"{self._stream} was written by an older owner")
            stall.report(Unanswered("its leader shows an older mark than it has confirmed"))
            await asyncio.sleep(RETRY_SECONDS_MAX / 4)

    async def _check_epoch(self) -> None:
        """No mark, or an older one, where mine stood: aged out or a stale answer if the LOG is the one I know."""
        state = await reaching(self._broker, await stream_of(self._broker, self._stream), self._placed.log_seq)
        if state.epoch != self._log_epoch:
            raise StepDown(f"{self._stream} changed its incarnation")
        if state.last_seq < self._placed.log_seq:
            raise PartitionStopped(
                f"{self._stream} ends at {state.last_seq}, before my mark at {self._placed.log_seq}",
                f"It was restored from a backup: run `seamark topology restore {self._stream}`",
            )


def _reason(error: BrokerError) -> str:
    if isinstance(error, ApiError):
        return str(error.err_code or error.code)
    return "unanswered" if isinstance(error, Unanswered) else "unavailable"
