"""Builds a new version of the tables beside the live one and switches to it: readers see the one or the other.

What the log no longer holds is carried over from the live version and marked so. While the switch is made, the live
projector waits: its checkpoints are locked, the new version catches up with them, and then one row names the other version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import asyncpg
import msgspec
import structlog

from engine.errors import InvalidSetting, TopologyError
from engine.incarnations import stream_of
from engine.jetstream import Broker
from engine.subjects import RECEIPTS_STREAM, encode_token, log_stream
from projections.deliveries import DELIVERIES, EARLIEST, DeliveriesStore
from projections.inbox import INBOX, InboxStore
from projections.inbox_fold import Row
from projections.postgres import AWAY, away, live_version
from projections.replay import replay
from projections.store import Checkpoint, Store

if TYPE_CHECKING:
    from projections.postgres import Connection, Pool

_log = structlog.get_logger("seamark.rebuild")

SWITCH_SECONDS: Final = 60.0
"""For the last part, while the live projector waits."""

SIDE_BY_SIDE: Final = 2
"""Partitions folded at a time: one process and one database have not more to do."""

LOCK_SECONDS: Final = 0.25
"""To drop a version all readers must let go of it, and while that is waited for, new ones wait behind it: not for long."""

DROP_TRIES: Final = 5

BOOK_SECONDS: Final = 10.0
"""One look at the checkpoints."""

CARRY_SECONDS: Final = 600.0
"""For one statement that copies what the log no longer holds."""

SLACK: Final = "5 minutes"
"""Receipts carry the clock of a gateway: around the horizon they are both carried and folded, which changes nothing."""

_ALONE: Final = "SELECT pg_advisory_xact_lock(7345252)"
"""Versions are made, switched to and dropped by one rebuild at a time; folding needs no lock."""

Progress = Callable[[int, int, int], None]
"""`progress(partition, reached, target)`: sequences of the stream."""


class Rebuilt(msgspec.Struct):
    """What a rebuild has done."""

    projection: str
    version: int
    records: int
    carried: int
    tenant: str | None = None


_INBOX_COLUMNS: Final = ", ".join(Row.__dataclass_fields__)
_DELIVERY_COLUMNS: Final = (
    "tenant, user_id, id, channel, device, rank, state, reason, provider, trace, at, attempts,"
    " sent_at, delivered_at, acknowledged_at, seen_at, read_at"
)
_RANGE_COLUMNS: Final = "tenant, user_id, device, channel, state, epoch, after_seq, up_to, at, sent_at"
_CURSOR_COLUMNS: Final = "tenant, user_id, device, epoch, seq, at"
_TABLES: Final = {
    INBOX: {"inbox": f"{_INBOX_COLUMNS}, carried"},
    DELIVERIES: {
        "deliveries": _DELIVERY_COLUMNS,
        "delivery_ranges": _RANGE_COLUMNS,
        "device_cursors": _CURSOR_COLUMNS,
    },
}


class Rebuild:
    """One rebuild of `inbox` or `deliveries`.

    Args:
        partitions: how many there are.
        tenant: only this tenant's rows; they are exchanged in the live version.
        progress: told now and then.
    """

    def __init__(
        self,
        broker: Broker,
        pool: Pool,
        projection: str,
        partitions: int,
        *,
        tenant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if projection not in _TABLES:
            raise InvalidSetting(f"{projection} is no projection in PostgreSQL")
        self._broker = broker
        self._pool = pool
        self._projection = projection
        self._partitions = range(partitions)
        self._tenant = tenant
        self._progress = progress
        self._live = self._version = 0
        self._records = [0] * partitions
        self._carried = 0

    async def run(self) -> Rebuilt:
        """Build, switch, drop what is no longer read.

        Raises:
            StoreUnavailable, BrokerError: nothing has changed for readers.
        """
        try:
            await self._begin()
            await self._carry_formerly()
            await self._fold_all()
            await self._fold_all()  # what has come meanwhile
            await self._switch()
            await self._drop()
        except AWAY as error:
            raise away(error) from error
        return Rebuilt(self._projection, self._version, sum(self._records), self._carried, self._tenant)

    async def _begin(self) -> None:
        """A fresh version; leftovers of a rebuild that did not end are dropped."""
        async with asyncio.timeout(SWITCH_SECONDS), self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ALONE)
            self._live = await live_version(connection, self._projection)
            prefix = f"{self._projection}_"
            names = await connection.fetch(
                "SELECT c.relname FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid"
                " WHERE h.inhparent = $1::regclass",
                self._projection,
            )
            existing = [int(row["relname"].removeprefix(prefix)) for row in names]
            for leftover in set(existing) - {self._live}:
                await self._drop_version(connection, leftover)
            self._version = max(existing, default=self._live) + 1
            await connection.execute("SELECT seamark_create_version($1, $2)", self._projection, self._version)

    def _stream(self, p: int) -> str:
        return log_stream(p) if self._projection == INBOX else RECEIPTS_STREAM

    def _subject(self, p: int) -> str:
        kind = "log" if self._projection == INBOX else "rcpt"
        return f"{kind}.{p}.>" if self._tenant is None else f"{kind}.{p}.{encode_token(self._tenant)}.>"

    def _store(self, p: int) -> Store:
        make = InboxStore if self._projection == INBOX else DeliveriesStore
        return make(self._pool, p, version=self._version)

    async def _head(self, p: int) -> int:
        newest = await self._broker.leader_last(self._stream(p), self._subject(p))
        return newest.seq if newest is not None else 0

    async def _target(self, p: int) -> int:
        """Up to where to fold. Rows that go into the live version must not be ahead of it: it would fold over them again."""
        head = await self._head(p)
        if self._tenant is None:
            return head
        live = await self._live_checkpoint(p)
        if live is not None and live["epoch"] != await self._epoch(p):
            detail = f"{self._projection} was folded from another incarnation of {self._stream(p)}"
            raise TopologyError(detail, f"Run `seamark rebuild {self._projection}`.")
        return min(head, live["seq"]) if live is not None else 0

    # --- folding -----------------------------------------------------------------------------------------------------

    async def _fold_all(self) -> None:
        """Every partition up to its end; while PostgreSQL writes for one, another is folded."""
        slots = asyncio.Semaphore(SIDE_BY_SIDE)

        async def fold(p: int) -> None:
            async with slots:
                await self._fold(p, await self._target(p))

        try:
            async with asyncio.TaskGroup() as tasks:
                for p in self._partitions:
                    tasks.create_task(fold(p), name=f"rebuild {self._projection} {p}")
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _fold(self, p: int, target: int) -> None:
        """Fold up to `target`; the first time from the oldest record there is."""
        store = self._store(p)
        at = await store.checkpoint()
        if at is None:
            if target == 0:
                await self._settle_empty(p)
                return
            first = True
        else:
            first = False
        start = 1 if at is None else at.seq + 1
        async for batch in replay(self._broker, self._stream(p), self._subject(p), start, target):
            if first:
                at, first = await self._settle(p, batch[0].seq), False
            assert at is not None, "settled before the first batch"
            reached = Checkpoint(at.epoch, batch[-1].seq)
            if not await store.apply(batch, at, reached):
                raise _another()
            at = reached
            self._records[p] += len(batch)
            if self._progress is not None:
                self._progress(p, at.seq, target)
        if first:  # all that the log holds comes after `target`
            await self._settle(p, target + 1)

    async def _settle(self, p: int, oldest: int) -> Checkpoint:
        """What stood before the oldest record of the log is carried over; then the fold begins there."""
        epoch = await self._epoch(p)
        if self._projection == INBOX:
            await self._carry_inbox("epoch = $1 AND seq < $2", epoch, oldest)
        return await self._store_first(p, Checkpoint(epoch, oldest - 1))

    async def _settle_empty(self, p: int) -> None:
        """The log holds nothing: all rows are carried over, and the position is the end of the stream."""
        state = await stream_of(self._broker, self._stream(p))
        if await self._head(p):
            return  # something has come: the next round folds it
        epoch = await self._epoch(p)
        if self._projection == INBOX:
            await self._carry_inbox("epoch = $1", epoch)
        await self._store_first(p, Checkpoint(epoch, state.last_seq))

    async def _epoch(self, p: int) -> str:
        state = await stream_of(self._broker, self._stream(p))
        if state.epoch is None:
            raise TopologyError(f"{state.name} has no epoch", "Run `seamark topology apply`.")
        return state.epoch

    async def _store_first(self, p: int, at: Checkpoint) -> Checkpoint:
        """The new version's first checkpoint. Rows of another epoch than the live one's begin a new era."""
        live = await self._live_checkpoint(p)
        era = 1 if live is None else live["era"] + (live["epoch"] != at.epoch)
        await self._pool.execute(
            "INSERT INTO projection_checkpoints (projection, version, stream, partition, epoch, era, seq)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7)",
            self._projection,
            self._version,
            self._stream(p),
            p,
            at.epoch,
            era,
            at.seq,
            timeout=BOOK_SECONDS,
        )
        return at

    async def _live_checkpoint(self, p: int) -> asyncpg.Record | None:
        return await self._pool.fetchrow(
            "SELECT epoch, era, seq FROM projection_checkpoints"
            " WHERE projection = $1 AND version = $2 AND stream = $3 AND partition = $4",
            self._projection,
            self._live,
            self._stream(p),
            p,
            timeout=BOOK_SECONDS,
        )

    # --- carrying over -----------------------------------------------------------------------------------------------

    async def _carry_formerly(self) -> None:
        """Rows that no stream of today can give: of former incarnations, and receipts older than the oldest."""
        if self._projection == INBOX:
            epochs = [await self._epoch(p) for p in self._partitions]
            await self._carry_inbox("epoch <> ALL ($1)", epochs)
            return
        state = await stream_of(self._broker, RECEIPTS_STREAM)
        folded = await self._pool.fetch(
            "SELECT epoch FROM projection_checkpoints WHERE projection = $1 AND version = $2",
            DELIVERIES,
            self._live,
            timeout=BOOK_SECONDS,
        )
        if state.first_seq <= 1 and all(row["epoch"] == state.epoch for row in folded):
            return  # the stream holds all there ever was
        oldest = await self._broker.leader_next(RECEIPTS_STREAM, "rcpt.>", 1)
        for table, columns in _TABLES[DELIVERIES].items():
            where, args = "true", list[object]()
            if oldest is not None:
                where, args = f"{EARLIEST[table]} < $1::text::timestamptz + interval '{SLACK}'", [oldest.time]
            await self._copy(table, columns, columns, where, args)

    async def _carry_inbox(self, where: str, *args: object) -> None:
        await self._copy("inbox", f"{_INBOX_COLUMNS}, carried", f"{_INBOX_COLUMNS}, true", where, list(args))

    async def _copy(self, table: str, columns: str, values: str, where: str, args: list[object]) -> None:
        if self._tenant is not None:
            args.append(self._tenant)
            where = f"({where}) AND tenant = ${len(args)}"
        done = await self._pool.execute(
            f"INSERT INTO {table} ({columns}, version) SELECT {values}, {self._version} FROM {table}"
            f" WHERE version = {self._live} AND ({where})",
            *args,
            timeout=CARRY_SECONDS,
        )
        self._carried += int(done.rsplit(" ", 1)[1])

    # --- switching ---------------------------------------------------------------------------------------------------

    async def _switch(self) -> None:
        """Hold the live projector, catch up with it, name the new version."""
        async with asyncio.timeout(SWITCH_SECONDS), self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ALONE)
            await self._check_alone(connection)
            held = await connection.fetch(
                "SELECT stream, partition, epoch, seq FROM projection_checkpoints"
                " WHERE projection = $1 AND version = $2 ORDER BY partition FOR UPDATE",
                self._projection,
                self._live,
            )
            for row in held:
                await self._catch_up(row["partition"], Checkpoint(row["epoch"], row["seq"]))
            if self._tenant is not None:
                await self._exchange(connection, self._tenant)
                return
            await connection.execute(
                "UPDATE projection_versions SET version = $2, switched_at = now() WHERE projection = $1",
                self._projection,
                self._version,
            )
            # A batch that waits for the former version finds no checkpoint: it would be lost there, and hinder the drop.
            await connection.execute(
                "DELETE FROM projection_checkpoints WHERE projection = $1 AND version = $2",
                self._projection,
                self._live,
            )

    async def _check_alone(self, connection: Connection) -> None:
        """Whoever began later has dropped this version, or whoever was quicker the one it was to follow."""
        live = await live_version(connection, self._projection)
        mine = await connection.fetchval("SELECT to_regclass($1)::text", f"{self._projection}_{self._version}")
        if live != self._live or mine is None:
            raise _another()

    async def _drop(self) -> None:
        """Drop what is no longer read. What cannot be dropped now goes with the next rebuild."""
        dropped = self._live if self._tenant is None else self._version
        try:
            for _ in range(DROP_TRIES):
                async with asyncio.timeout(SWITCH_SECONDS), self._pool.acquire() as connection:
                    if await self._drop_version(connection, dropped):
                        return
                await asyncio.sleep(LOCK_SECONDS * 2)
        except AWAY as error:
            _log.warning("version_not_dropped", projection=self._projection, version=dropped, error=str(error))

    async def _drop_version(self, connection: Connection, version: int) -> bool:
        """False: somebody looks at the tables for long, a backup perhaps."""
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {round(LOCK_SECONDS * 1000)}")
                await connection.execute("SELECT seamark_drop_version($1, $2)", self._projection, version)
        except asyncpg.LockNotAvailableError:
            _log.warning("version_not_dropped", projection=self._projection, version=version, error="it is being read")
            return False
        return True

    async def _catch_up(self, p: int, live: Checkpoint) -> None:
        at = await self._store(p).checkpoint()
        if at is None or (at.epoch == live.epoch and at.seq < live.seq):
            await self._fold(p, min(live.seq, await self._head(p)))

    async def _exchange(self, connection: Connection, tenant: str) -> None:
        """One tenant's rows, in the live version."""
        for table, columns in _TABLES[self._projection].items():
            await connection.execute(
                f"DELETE FROM {table} WHERE version = {self._live} AND tenant = $1", tenant, timeout=SWITCH_SECONDS
            )
            await connection.execute(
                f"INSERT INTO {table} ({columns}, version) SELECT {columns}, {self._live} FROM {table}"
                f" WHERE version = {self._version} AND tenant = $1",
                tenant,
                timeout=SWITCH_SECONDS,
            )


def _another() -> TopologyError:
    return TopologyError("another rebuild has begun", "Run one rebuild of a projection at a time.")
