"""Recomputes a projection from its streams with the pure fold and names every difference to what is stored.

However large streams and tables are, it takes the memory of a few users and no view of the database that lasts:

1. The streams are read once, and what the fold needs of each message goes to disk, divided by user.
2. The tables are read once, block by block as they lie, each stretch by a statement of its own; rows go to disk beside it.
3. Part by part, users are folded and compared. Projectors and users are at work meanwhile, so what differs is only suspected:
   such a user is looked at closely, rows and checkpoint in one view, and the user's own log folded up to that checkpoint.

So a difference is one that exists at a single moment, whatever else goes on. A broker or database that restarts meanwhile is
waited for. Rows that the streams no longer hold cannot be recomputed; they are counted.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg
import msgspec

from engine.broker.jetstream import Broker
from engine.errors import TopologyError
from engine.log.incarnations import stream_of
from engine.partition.reader import Delivered
from projections.postgres.patience import patiently
from projections.postgres.versions import asking
from projections.replay import replay
from projections.store import Checkpoint, StoreBroken
from projections.verify.spill import Spill, Users
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import decode_token, encode_token, partition_of

if TYPE_CHECKING:
    from projections.postgres.versions import Connection, Pool

LIVE: Final = "(SELECT version FROM projection_versions WHERE projection = '{0}')"

BLOCKS: Final = 1024
"""Blocks of a table that one statement reads: 8 MB, in some 10 ms."""

LOOK_SECONDS: Final = 30.0
"""For one such statement, or for the rows of one user."""

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`."""


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
    compared: int
    not_verifiable: int = 0


class Part(NamedTuple):
    """What is read of a partition: from `oldest`, the first sequence its stream still has, to `target`."""

    number: int
    stream: str
    epoch: str
    target: int
    oldest: int


class StreamVerification(ABC):
    """One verification; iterate over `differences`, then look at `result`.

    Args:
        partitions: how many there are.
        progress: told now and then.
    """

    projection: str
    kind: str
    """First token of the subjects it is folded from."""

    def __init__(self, broker: Broker, partitions: int, progress: Progress | None = None) -> None:
        self._broker = broker
        self._partitions = partitions
        self._progress = progress or _untold
        self._parts: dict[int, Part] = {}
        self.result = Verified(self.projection)

    async def differences(self) -> AsyncIterator[Difference]:
        """Every difference there is.

        Raises:
            StoreUnavailable, BrokerError: it could not be told. TopologyError: another incarnation of a stream.
        """
        try:
            await self._prepare()
            with tempfile.TemporaryDirectory(prefix="seamark-verify-") as folder:
                spill = Spill(Path(folder), await self._messages())
                await self._read_all(spill)
                for number in range(spill.parts):
                    self._progress("comparing", number, spill.parts)
                    for user in await self._compare(spill.take(number)):
                        for difference in await self._closely(user):
                            self.result.differences += 1
                            yield difference
                self._progress("comparing", spill.parts, spill.parts)
        finally:
            await self._close()

    async def _read_all(self, spill: Spill) -> None:
        for part in self._parts.values():
            await self._read_stream(spill, part)
        await self._read_stored(spill)
        spill.flush()

    async def _prepare(self) -> None:
        for p in range(self._partitions):
            stream = self._stream(p)
            at = await patiently(lambda p=p: self._checkpoint(p))  # type: ignore[misc]
            if at is not None:
                self._parts[p] = await patiently(lambda p=p, s=stream, at=at: self._part(p, s, at))  # type: ignore[misc]

    async def _part(self, p: int, stream: str, at: Checkpoint) -> Part:
        await self._check_epoch(stream, at)
        first = await self._broker.leader_next(stream, f"{self.kind}.{p}.>", 1)
        newest = await self._broker.leader_last(stream, f"{self.kind}.{p}.>")
        target = min(at.seq, newest.seq) if newest is not None else 0
        return Part(p, stream, at.epoch, target, first.seq if first is not None and target else at.seq + 1)

    async def _check_epoch(self, stream: str, at: Checkpoint) -> None:
        if (await stream_of(self._broker, stream)).epoch != at.epoch:
            raise TopologyError(
                f"{self.projection} was folded from another incarnation of {stream}",
                f"Run `seamark rebuild {self.projection}`.",
            )

    async def _messages(self) -> int:
        streams = {part.stream for part in self._parts.values()}
        return sum([(await patiently(lambda s=s: self._broker.stream(s))).messages for s in streams])  # type: ignore[misc]

    async def _read_stream(self, spill: Spill, part: Part) -> None:
        stage = part.stream if part.stream.endswith(str(part.number)) else f"{part.stream}, partition {part.number}"
        self._progress(stage, 0, part.target)
        async for batch in replay(self._broker, part.stream, f"{self.kind}.{part.number}.>", 1, part.target):
            for stored in batch:
                user = user_of(stored.subject)
                item = self._light(stored) if user is not None else None
                if user is not None and item is not None:
                    spill.said(user, item)
            self._progress(stage, batch[-1].seq, part.target)
        self._progress(stage, part.target, part.target)

    async def _compare(self, users: Users) -> list[str]:
        """Returns the users for whom something differs; the others are counted."""
        suspects = []
        for user, (said, stored) in users.items():
            part = self._parts.get(self.partition(user))
            if part is None:
                continue
            judgement = self._judge(user, part, said, stored)
            if judgement.differences:
                suspects.append(user)
            else:
                self._count(judgement)
        return suspects

    def _count(self, judgement: Judgement) -> None:
        self.result.compared += judgement.compared
        self.result.not_verifiable += judgement.not_verifiable

    async def _closely(self, user: str) -> list[Difference]:
        """The differences of one user at one moment."""
        self.result.looked_at_closely += 1
        judgement = await patiently(lambda: self._look(user))
        self._count(judgement)
        return judgement.differences

    async def _said(self, user: str, part: Part, upto: int) -> list[bytes]:
        """What one user's part of a stream says, up to a sequence."""
        subject = f"{self.kind}.{part.number}.{user}"
        newest = await self._broker.leader_last(part.stream, subject)
        found: list[bytes] = []
        async for batch in replay(self._broker, part.stream, subject, 1, min(upto, newest.seq if newest else 0)):
            found += [item for stored in batch if (item := self._light(stored)) is not None]
        return found

    def partition(self, user: str) -> int:
        """The partition of `<tenant>.<user>` (tokens)."""
        tenant, _, name = user.partition(".")
        return partition_of(tenant, name, self._partitions)

    async def _close(self) -> None:
        """Close what was opened."""
        return

    @abstractmethod
    def _stream(self, p: int) -> str: ...

    @abstractmethod
    async def _checkpoint(self, p: int) -> Checkpoint | None:
        """The stored checkpoint; None: nothing was ever folded."""

    @abstractmethod
    def _light(self, stored: Delivered) -> bytes | None:
        """The part of a message that the fold needs; None: the message is passed over."""

    @abstractmethod
    async def _read_stored(self, spill: Spill) -> None:
        """Add everything that is stored to `spill`."""

    @abstractmethod
    def _judge(self, user: str, part: Part, said: Sequence[bytes], stored: Sequence[bytes]) -> Judgement:
        """Fold what the streams say of a user, and compare it with what is stored."""

    @abstractmethod
    async def _look(self, user: str) -> Judgement:
        """Compare one user, with everything read at one moment."""


def _untold(stage: str, done: int, total: int) -> None:
    """Nobody is told."""


@functools.lru_cache(maxsize=10_000)
def user_of(subject: bytes) -> str | None:
    """`<tenant>.<user>` of `log.<p>.<tenant>.<user>`; None: no tokens that anybody could have."""
    try:
        _, _, tenant, user = subject.decode().split(".")
        decode_token(tenant)
        decode_token(user)
    except (ValueError, InvalidToken):
        return None
    return f"{tenant}.{user}"


def names_of(user: str) -> tuple[str, str]:
    """Tenant and user of `<tenant>.<user>`, as text."""
    tenant, _, name = user.partition(".")
    return decode_token(tenant), decode_token(name)


def tokens_of(tenant: str, user: str) -> str:
    """`<tenant>.<user>`, as tokens."""
    return f"{encode_token(tenant)}.{encode_token(user)}"


class Tables:
    """Reads tables of a projection from one end to the other.

    Args:
        projection: whose live version.
    """

    def __init__(self, pool: Pool, projection: str, progress: Progress) -> None:
        self._pool = pool
        self._live = LIVE.format(projection)
        self._progress = progress

    async def rows(self, table: str, columns: str, where: str = "true") -> AsyncIterator[list[asyncpg.Record]]:
        """Rows of the live version, some at a time, in no order. One that changes meanwhile may come twice, or not at all.

        Raises:
            StoreUnavailable: the database was away for too long. TopologyError: another version was switched to.
        """
        version = await patiently(self._read_version)
        leaves = await patiently(lambda: self._leaves(table))
        total, done = sum(blocks for _, blocks in leaves), 0
        self._progress(f"table {table}", 0, total)
        for leaf, blocks in leaves:
            statement = (
                f"SELECT {columns} FROM {leaf} WHERE version = {self._live} AND ({where})"
                " AND ctid >= $1::text::tid AND ctid < $2::text::tid"
            )
            for start in range(0, blocks, BLOCKS):
                stop = min(blocks, start + BLOCKS)
                rows = await patiently(lambda a=start, b=stop, s=statement: self._stretch(s, a, b))  # type: ignore[misc]
                if rows is None:
                    await patiently(lambda: self._check_version(version))
                    break  # it was a month that is over, and the log holds nothing of what was in it
                yield rows
                self._progress(f"table {table}", done + stop, total)
            done += blocks

    async def _leaves(self, table: str) -> list[tuple[str, int]]:
        """The tables that hold rows, by name, and how many blocks each has."""
        async with asking(self._pool, LOOK_SECONDS) as connection:
            rows = await connection.fetch(
                "SELECT c.oid::regclass::text AS name, pg_relation_size(c.oid) / current_setting('block_size')::int AS blocks"
                " FROM (SELECT relid FROM pg_partition_tree($1::text::regclass) WHERE isleaf"
                "       UNION SELECT $1::text::regclass) t JOIN pg_class c ON c.oid = t.relid WHERE c.relkind = 'r'",
                table,
            )
        return [(row["name"], row["blocks"]) for row in rows]

    async def _stretch(self, statement: str, start: int, stop: int) -> list[asyncpg.Record] | None:
        """None: the table has been dropped."""
        try:
            async with asking(self._pool, LOOK_SECONDS) as connection:
                return await connection.fetch(statement, f"({start},0)", f"({stop},0)")
        except StoreBroken as error:
            if isinstance(error.__cause__, asyncpg.UndefinedTableError):
                return None
            raise

    async def _read_version(self) -> int:
        async with asking(self._pool, LOOK_SECONDS) as connection:
            return int(await connection.fetchval(f"SELECT {self._live}"))

    async def _check_version(self, version: int) -> None:
        if await self._read_version() != version:
            raise TopologyError("a rebuild has switched to another version meanwhile", "Run it again.")


async def checkpoint_of(
    connection: Connection, projection: str, stream: str, partition: int
) -> tuple[Checkpoint, int] | None:
    """The live version's checkpoint of a partition, and its era."""
    row = await connection.fetchrow(
        "SELECT epoch, seq, era FROM projection_checkpoints WHERE projection = $1 AND stream = $2 AND partition = $3"
        f" AND version = {LIVE.format(projection)}",
        projection,
        stream,
        partition,
    )
    return None if row is None else (Checkpoint(row["epoch"], row["seq"]), row["era"])


@contextlib.asynccontextmanager
async def one_view(pool: Pool) -> AsyncIterator[Connection]:
    """A connection on which all statements of the block see the database as the first of them sees it.

    Raises:
        StoreUnavailable: PostgreSQL does not answer in time.
    """
    async with asking(pool, LOOK_SECONDS) as connection:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield connection
        await connection.execute("COMMIT")
