"""Writing one stream from another: the chain of marks, held against stale owners and lost answers."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final, NamedTuple

import msgspec

from engine import failpoints, metrics
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, Broker, Outgoing
from engine.broker.refusals import is_final, is_incomplete, is_missing
from engine.errors import ApiError, BrokerError, PartitionStopped, StepDown, Unanswered
from engine.log.incarnations import missing, reaching, stream_of
from engine.log.marks import NO_MARK, Mark, MarkedStream, PlacedMark, Verdict, decode_mark, encode_mark, settle
from engine.log.stalls import Stall
from seamark.backoff import Backoff
from seamark.protocol.records import epoch_line

RETRY_SECONDS_MIN = 0.02
RETRY_SECONDS_MAX = 1.0


class Overtaken(BrokerError):
    """An older owner wrote between my take-over and my batch: read every position again."""


class TooLate(BrokerError):
    """What a batch was decided by is too old by now, and it is not stored: read every position again, and decide anew."""


class Ownership(NamedTuple):
    """One acquisition of a part of the source. `source_epoch` is the incarnation of the source its positions belong to."""

    term: int
    owner: str
    source_epoch: str


async def read_mark(broker: Broker, marked: MarkedStream) -> PlacedMark:
    """The mark as the leader of the stream shows it.

    Raises:
        PartitionStopped: somebody wrote something else there, or there is no such stream.
    """
    try:
        stored = await broker.leader_last(marked.name, marked.subject)
    except ApiError as error:
        if is_missing(error):
            raise missing(marked.name) from error
        raise
    if stored is None:
        return NO_MARK
    try:
        return PlacedMark(stored.seq, decode_mark(stored.payload))
    except msgspec.DecodeError as error:
        remedy = f"Delete message {stored.seq} of {marked.name}: the mark before it counts then"
        raise PartitionStopped(f"what {marked.subject} holds is not a mark ({error})", remedy) from error


class Missing(NamedTuple):
    """From which event on dead letters are missing, and from which on because nothing could be put off: see `Mark`."""

    unburied: int | None = None
    refused: int | None = None


NONE_MISSING: Final = Missing()


class MarkedWriter:
    """Appends batches to one stream, each ended by a mark that must follow the one before.

    Made by `take_over`. One batch is in flight at a time.
    """

    def __init__(
        self, broker: Broker, marked: MarkedStream, ownership: Ownership, epoch: str, placed: PlacedMark
    ) -> None:
        self._broker = broker
        self._marked = marked
        self._ownership = ownership
        self._epoch = epoch
        self._epoch_line = epoch_line(epoch)
        self._placed = placed

    @classmethod
    async def take_over(
        cls,
        broker: Broker,
        marked: MarkedStream,
        ownership: Ownership,
        *,
        epoch: str,
        found: PlacedMark,
        mark: Mark | None,
        start_seq: int,
    ) -> MarkedWriter:
        """Write the mark again under this ownership: from then on every older owner's batch is refused.

        Args:
            epoch: the incarnation the stream is in.
            found: the mark as the leader showed it.
            mark: what it says in the present incarnations, see `incarnations.translated`.
            start_seq: the position where there is no mark yet.

        Raises:
            StepDown: a newer owner is there.
        """
        if found.mark is not None and found.mark.term >= ownership.term:
            raise StepDown(f"{marked.name} is marked by an owner of term {found.mark.term}")
        writer = cls(broker, marked, ownership, epoch, found)
        if mark is None:
            await writer.append([], start_seq)
        else:
            await writer.append([], mark.seq, mark.user, missing=Missing(mark.unburied, mark.refused))
        return writer

    @property
    def mark(self) -> Mark:
        """The last mark this owner wrote."""
        assert self._placed.mark is not None
        return self._placed.mark

    async def append(
        self,
        messages: list[Outgoing],
        seq: int,
        user: str | None = None,
        *,
        missing: Missing = NONE_MISSING,
        until: float = math.inf,
        refusable: bool = False,
    ) -> None:
        """Store the messages and the position (see `Mark`), whatever it takes; returns when they are.

        Args:
            missing: which dead letters are, in a dispatcher's home mark.
            until: messages are handed to the broker before this moment of the monotonic clock, or not at all. Those that were
                handed over without an answer may still be stored; whoever takes over finds out.
            refusable: whether messages that the stream may never take are the caller's matter. Else they are tried for ever.

        Raises:
            ApiError: such messages: `is_final`, or 10176, which may mean the same; nothing is stored.
            StepDown: a newer owner took over, or the stream has another epoch. Overtaken: an older owner got in between.
            TooLate: the messages were not stored by then.
            PartitionStopped: the stream was put back to a backup, and nobody has said so.
        """
        own = self._ownership
        mark = Mark(own.source_epoch, seq, own.term, own.owner, self._epoch, user, *missing)
        payload = encode_mark(mark)
        stall, backoff = Stall(self._marked.name), Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX, jitter=0.5)
        try:
            while True:
                lines = self._marked.lines(self._placed.seq)
                batch = [*messages, Outgoing(self._marked.subject, payload, lines)]
                if messages:
                    failpoints.reach("before-append")
                    if time.monotonic() > until:
                        raise TooLate
                try:
                    ack = await self._broker.commit(batch, lines=self._epoch_line)
                    failpoints.reach("after-commit-before-answer")
                    self._placed = PlacedMark(ack.seq, mark)
                    return
                except BrokerError as error:
                    if refusable and messages and (is_final(error) or is_incomplete(error)):
                        raise
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
        name = self._marked.name
        while True:
            try:
                found = await read_mark(self._broker, self._marked)
                verdict = settle(sent, self._placed, found)
                if verdict in (Verdict.GONE, Verdict.ASK_AGAIN):
                    await self._check_epoch()
            except BrokerError as error:
                stall.report(error)
                await asyncio.sleep(RETRY_SECONDS_MAX / 4)
                continue
            if verdict is Verdict.STEP_DOWN:
                raise StepDown(f"{name} was taken over by another owner")
            if verdict is Verdict.TAKE_OVER:
                raise Overtaken(f"{name} was written by an older owner")
            if verdict is not Verdict.ASK_AGAIN:
                self._placed = found
                return verdict is Verdict.COMMITTED
            stall.report(Unanswered("its leader shows an older mark than it has confirmed"))
            await asyncio.sleep(RETRY_SECONDS_MAX / 4)

    async def _check_epoch(self) -> None:
        """No mark, or an older one, where mine stood: aged out or a stale answer if the stream is the one I know."""
        name, placed_seq = self._marked.name, self._placed.seq
        state = await reaching(self._broker, await stream_of(self._broker, name), placed_seq)
        if state.epoch != self._epoch:
            raise StepDown(f"{name} changed its incarnation")
        if state.last_seq < placed_seq:
            raise PartitionStopped(
                f"{name} ends at {state.last_seq}, before my mark at {placed_seq}",
                f"It was restored from a backup: run `seamark topology restore {name}`",
            )


def _reason(error: BrokerError) -> str:
    if isinstance(error, ApiError):
        return str(error.err_code or error.code)
    return "unanswered" if isinstance(error, Unanswered) else "unavailable"
