"""Recomputes a projection from its streams with the pure fold and names every difference to what is stored.

However large streams and tables are, it takes the memory of a few users and no view of the database that lasts:

1. The streams are read once, and what the fold needs of each message goes to disk, divided by user.
2. What is stored is read once, and goes to disk beside it.
3. Part by part, users are folded and compared. Projectors and users are at work meanwhile, so what differs is only suspected:
   such a user is looked at closely, rows and checkpoint in one view, and the user's own log folded up to that checkpoint.

So a difference is one that exists at a single moment, whatever else goes on. A broker or database that restarts meanwhile is
waited for. Rows that the streams no longer hold cannot be recomputed; they are counted.
"""

from __future__ import annotations

import functools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine.broker.jetstream import Broker
from engine.errors import TopologyError
from engine.log.incarnations import stream_of
from engine.partition.reader import Delivered
from engine.patience import patiently
from projections.postgres.versions import Place
from projections.projection import Projection, Table
from projections.replay import Progress, no_progress, replay
from projections.verify.spill import Spill, Users
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import decode_token, encode_token, partition_of

Key = tuple[Any, ...]
"""The name of a table, and the key of a row of it."""


class Difference(msgspec.Struct, omit_defaults=True):
    """One thing that is stored differently from what the streams say. `stored` or `expected` None: there is none."""

    what: str
    key: list[str]
    field: str | None = None
    stored: Any = None
    expected: Any = None


class Verified(msgspec.Struct):
    """What a verification has looked at; the differences themselves were handed out before.

    Attributes:
        not_verifiable: older than what the streams hold.
        looked_at_closely: users who differed at first sight, most of them because something came for them meanwhile.
    """

    projection: str
    compared: int = 0
    differences: int = 0
    not_verifiable: int = 0
    looked_at_closely: int = 0


class Judgement(NamedTuple):
    """The result of comparing one user."""

    differences: list[Difference]
    compared: int = 0
    not_verifiable: int = 0


class Part(NamedTuple):
    """What is compared of a partition.

    Attributes:
        place: up to where it is folded.
        oldest: the first sequence its stream still has.
        horizon: when the oldest message was stored of those that the stream still has; None: it has all there ever were.
    """

    number: int
    place: Place
    oldest: int
    horizon: datetime | None


class Row(NamedTuple):
    """A row of a table. `earliest`: when the first message was stored or given that it holds."""

    table: Table
    key: tuple[Any, ...]
    facts: dict[str, Any]
    earliest: datetime

    @property
    def place(self) -> Key:
        """The table and the key: what names it."""
        return (self.table.name, *self.key)


class StreamVerification(ABC):
    """One verification; iterate over `differences`, then look at `result`.

    Args:
        progress: told now and then.
    """

    projection: Projection

    def __init__(self, broker: Broker, partitions: int, progress: Progress = no_progress) -> None:
        self._broker = broker
        self._partitions = partitions
        self._progress = progress
        self._parts: dict[int, Part] = {}
        self.result = Verified(self.projection.name)

    async def differences(self) -> AsyncIterator[Difference]:
        """Every difference there is.

        Raises:
            StoreUnavailable, BrokerError: it could not be told. TopologyError: another incarnation of a stream.
        """
        try:
            messages = {}
            for p in range(self._partitions):
                place = await patiently(self._place, p)
                if place is not None:
                    self._parts[p] = await patiently(self._part, p, place)
                    stream = self.projection.stream(p)
                    messages[stream] = (await patiently(self._broker.stream, stream)).messages
            with tempfile.TemporaryDirectory(prefix="seamark-verify-") as folder:
                spill = Spill(Path(folder), sum(messages.values()))
                for part in self._parts.values():
                    await self._read_stream(spill, part)
                await self._read_stored(spill)
                spill.flush()
                for number in range(spill.parts):
                    self._progress("comparing", number, spill.parts)
                    for user in await self._suspects(spill.take(number)):
                        self.result.looked_at_closely += 1
                        for difference in self._counted(await patiently(self._look, user)):
                            yield difference
                self._progress("comparing", spill.parts, spill.parts)
        finally:
            await self._close()

    async def _close(self) -> None:
        """Close what was opened."""
        return

    async def _part(self, p: int, place: Place) -> Part:
        """What is to be compared of a partition now, with the oldest message that its stream still has.

        Raises:
            TopologyError: it was folded from another incarnation of the stream.
        """
        stream = self.projection.stream(p)
        state = await stream_of(self._broker, stream)
        if state.epoch != place.checkpoint.epoch:
            raise TopologyError(
                f"{self.projection.name} was folded from another incarnation of {stream}",
                f"Run `seamark rebuild {self.projection.name}`.",
            )
        first = await self._broker.leader_next(stream, self.projection.subject(p), 1)
        oldest = first.seq if first is not None else place.checkpoint.seq + 1
        any_first = await self._broker.leader_next(stream, f"{self.projection.kind}.>", 1)
        began = datetime.fromisoformat(any_first.time) if any_first is not None else datetime.max.replace(tzinfo=UTC)
        return Part(p, place, oldest, began if state.first_seq > 1 else None)

    async def _read_stream(self, spill: Spill, part: Part) -> None:
        stream, subject = self.projection.stream(part.number), self.projection.subject(part.number)
        stage = stream if stream.endswith(str(part.number)) else f"{stream}, partition {part.number}"
        newest = await patiently(self._broker.leader_last, stream, subject)
        target = min(part.place.checkpoint.seq, newest.seq) if newest is not None else 0
        self._progress(stage, 0, target)
        async for batch in replay(self._broker, stream, subject, 1, target):
            for stored in batch:
                user = user_of(stored.subject)
                light = self._light(stored) if user is not None else None
                if user is not None and light is not None:
                    spill.said(user, msgspec.structs.astuple(light))
            self._progress(stage, batch[-1].seq, target)
        self._progress(stage, target, target)

    async def _said(self, user: str, part: Part) -> list[Delivered]:
        """What one user's part of a stream says, up to where it is folded."""
        stream, subject = self.projection.stream(part.number), f"{self.projection.kind}.{part.number}.{user}"
        newest = await self._broker.leader_last(stream, subject)
        target = min(part.place.checkpoint.seq, newest.seq) if newest is not None else 0
        found: list[Delivered] = []
        async for batch in replay(self._broker, stream, subject, 1, target):
            found += [light for stored in batch if (light := self._light(stored)) is not None]
        return found

    def _counted(self, judgement: Judgement) -> list[Difference]:
        self.result.compared += judgement.compared
        self.result.not_verifiable += judgement.not_verifiable
        self.result.differences += len(judgement.differences)
        return judgement.differences

    def partition(self, user: str) -> int:
        """The partition of `<tenant>.<user>` (tokens)."""
        tenant, _, name = user.partition(".")
        return partition_of(tenant, name, self._partitions)

    @abstractmethod
    def _light(self, stored: Delivered) -> Delivered | None:
        """What the fold needs of a message, which as a whole would fill disk and memory; None: the message is passed over."""

    @abstractmethod
    async def _place(self, p: int) -> Place | None:
        """The stored checkpoint; None: nothing was ever folded."""

    @abstractmethod
    async def _read_stored(self, spill: Spill) -> None:
        """Add everything that is stored to `spill`."""

    @abstractmethod
    async def _suspects(self, users: Users) -> list[str]:
        """The users for whom something differs at first sight; the others are counted."""

    @abstractmethod
    async def _look(self, user: str) -> Judgement:
        """Compare one user, with everything read at one moment."""


@functools.lru_cache(maxsize=10_000)
def user_of(subject: bytes) -> str | None:
    """`<tenant>.<user>` of `log.<p>.<tenant>.<user>`; None: no tokens that anybody could have."""
    try:
        _, _, user = subject.decode().split(".", 2)
    except ValueError:
        return None
    return user if is_user(user) else None


def is_user(user: str) -> bool:
    """Whether anybody can be called `<tenant>.<user>`, tokens that a log or a store has."""
    try:
        names_of(user)
    except InvalidToken:
        return False
    return True


def names_of(user: str) -> tuple[str, str]:
    """Tenant and user of `<tenant>.<user>`, as text."""
    tenant, _, name = user.partition(".")
    return decode_token(tenant), decode_token(name)


def tokens_of(tenant: str, user: str) -> str:
    """`<tenant>.<user>`, as tokens."""
    return f"{encode_token(tenant)}.{encode_token(user)}"
