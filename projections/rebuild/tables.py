"""Builds a new version of the tables beside the live one and switches to it: readers see the one or the other.

What the log no longer holds is carried over from the live version and marked so. While the switch is made, the live
projector waits: its checkpoints are locked, the new version catches up with them, and then one row names the other version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import asyncpg
import msgspec
import structlog

from engine.broker.jetstream import Broker
from engine.errors import InvalidSetting, TopologyError
from engine.log.incarnations import epoch_of
from engine.partition.reader import Delivered
from projections.deliveries.table import DELIVERIES, DeliveriesStore
from projections.folds.inbox import moment
from projections.inbox.table import INBOX, InboxStore
from projections.postgres.patience import patiently
from projections.postgres.versions import AWAY, asking, away, live_version, stored_checkpoint
from projections.rebuild.carrying import (
    CURSOR_COLUMNS,
    DELIVERY_COLUMNS,
    INBOX_COLUMNS,
    RANGE_COLUMNS,
    Carried,
    Carrying,
    Horizon,
)
from projections.replay import replay
from projections.store import Checkpoint, Store, StoreUnavailable
from seamark.protocol.subjects import RECEIPTS_STREAM, encode_token, log_stream

if TYPE_CHECKING:
    from projections.postgres.versions import Connection, Pool

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

CAUGHT_UP_SECONDS: Final = 5.0
"""A pass over what came during the one before it: when it took no longer, the rest is little enough for the switch."""

PASSES_MAX: Final = 20
"""Each pass has less to do than the one before it, unless records come faster than they are folded."""

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


_TABLES: Final = {
    INBOX: {"inbox": (*INBOX_COLUMNS, "carried", "kept_until")},
    DELIVERIES: {
        "deliveries": (*DELIVERY_COLUMNS, "kept_until"),
        "delivery_ranges": (*RANGE_COLUMNS, "kept_until"),
        "device_cursors": CURSOR_COLUMNS,
    },
}


class Rebuild:
    """One rebuild of `inbox` or `deliveries`.

    Args:
        partitions: how many there are.
        tenant: only this tenant's rows; they are exchanged in the live version.
        progress: told how far partitions are folded, now and then.
        carried: the same of what is carried over before.
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
        carried: Carried | None = None,
    ) -> None:
        if projection not in _TABLES:
            raise InvalidSetting(f"{projection} is no projection in PostgreSQL")
        self._broker = broker
        self._pool = pool
        self._projection = projection
        self._partitions = range(partitions)
        self._tenant = tenant
        self._progress = progress
        self._told = carried
        self._live = self._version = 0
        self._records = [0] * partitions
        self._horizons: list[Horizon] = []
        self._carrying: Carrying | None = None

    async def run(self) -> Rebuilt:
        """Build, switch, drop what is no longer read.

        Raises:
            StoreUnavailable, BrokerError: nothing has changed for readers.
        """
        try:
            await self._begin()
            await self._carry()
            await self._fold_until_caught_up()
            await self._switch()
            await self._drop()
        except AWAY as error:
            raise away(error) from error
        carried = self._carrying.rows if self._carrying is not None else 0
        return Rebuilt(self._projection, self._version, sum(self._records), carried, self._tenant)

    async def _begin(self) -> None:
        """A fresh version; leftovers of a rebuild that did not end are dropped."""
        async with asyncio.timeout(SWITCH_SECONDS), self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ALONE)
            self._live = await live_version(connection, self._projection)
            prefix = f"{self._projection}_"
            children = "SELECT inhrelid::regclass::text AS relname FROM pg_inherits WHERE inhparent = $1::regclass"
            names = await connection.fetch(children, self._projection)
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
        newest = await patiently(lambda: self._broker.leader_last(self._stream(p), self._subject(p)))
        return newest.seq if newest is not None else 0

    async def _target(self, p: int) -> int:
        """Up to where to fold. Rows that go into the live version must not be ahead of it: it would fold over them again."""
        head = await self._head(p)
        if self._tenant is None:
            return head
        live = await self._live_checkpoint(p)
        if live is not None and live["epoch"] != self._horizons[p].epoch:
            detail = f"{self._projection} was folded from another incarnation of {self._stream(p)}"
            raise TopologyError(detail, f"Run `seamark rebuild {self._projection}`.")
        return min(head, live["seq"]) if live is not None else 0

    # --- carrying over -----------------------------------------------------------------------------------------------

    async def _carry(self) -> None:
        """Look where the streams begin, and copy what they no longer hold."""
        self._horizons = [await self._horizon(p) for p in self._partitions]
        self._carrying = Carrying(self._pool, self._live, self._version, tenant=self._tenant, progress=self._told)
        live = [await self._live_checkpoint(p) for p in self._partitions]
        same = all(
            row is None or (row["era"] == 1 and row["epoch"] == one.epoch)
            for row, one in zip(live, self._horizons, strict=True)
        )
        if self._projection == INBOX:
            await self._carrying.inbox(self._horizons, formerly=not same)
            return
        state = await patiently(lambda: self._broker.stream(RECEIPTS_STREAM))
        if state.first_seq > 1 or not same:  # else the stream holds all there ever was
            oldest = await patiently(lambda: self._broker.leader_next(RECEIPTS_STREAM, "rcpt.>", 1))
            await self._carrying.deliveries(datetime.fromisoformat(oldest.time) if oldest is not None else None)

    async def _horizon(self, p: int) -> Horizon:
        """The oldest record there is. Of an empty log: behind its end, where the next one will be or further on."""
        state = await patiently(lambda: self._broker.stream(self._stream(p)))
        epoch = epoch_of(state)
        oldest = await patiently(lambda: self._broker.leader_next(self._stream(p), self._subject(p), 1))
        if oldest is None:
            return Horizon(epoch, state.last_seq + 1, None)
        return Horizon(epoch, oldest.seq, datetime.fromisoformat(oldest.time))

    # --- folding -----------------------------------------------------------------------------------------------------

    async def _fold_until_caught_up(self) -> None:
        """The whole log, then what has come meanwhile, until that is so little that a projector can wait for the rest."""
        for _ in range(PASSES_MAX):
            began = time.monotonic()
            await self._fold_all()
            if time.monotonic() - began < CAUGHT_UP_SECONDS:
                return
        _log.warning("rebuild_does_not_catch_up", projection=self._projection, passes=PASSES_MAX)

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
        at = await patiently(store.checkpoint)
        start = self._horizons[p].oldest if at is None else at.seq + 1
        if target == 0 and await self._head(p):
            return  # something has come: the next round folds it
        async for batch in replay(self._broker, self._stream(p), self._subject(p), start, target):
            if at is None:
                at = await self._store_first(p, batch[0].seq, moment(batch[0].time_nanoseconds))
            reached = Checkpoint(at.epoch, batch[-1].seq)
            await self._apply(store, batch, at, reached)
            at = reached
            self._records[p] += len(batch)
            if self._progress is not None:
                self._progress(p, at.seq, target)
        if at is None:  # what there is comes after `target`, or there is nothing
            await self._store_first(p, max(target + 1, self._horizons[p].oldest), datetime.now(UTC))

    async def _apply(self, store: Store, batch: list[Delivered], at: Checkpoint, reached: Checkpoint) -> None:
        """Fold a batch in. Where the outcome is unknown the checkpoint tells."""

        async def apply() -> None:
            stored = await store.checkpoint()
            if stored != reached and not (stored == at and await store.apply(batch, at, reached)):
                raise _another()

        try:
            done = await store.apply(batch, at, reached)
        except StoreUnavailable:
            await patiently(apply)
        else:
            if not done:
                raise _another()

    async def _store_first(self, p: int, first: int, at: datetime) -> Checkpoint:
        """Where the fold of a partition begins: at record `first`, which was stored at `at`.

        What age has taken from the log since the horizon was looked at is carried over, too. Rows of another epoch than the
        live one's begin a new era.
        """
        horizon = self._horizons[p]
        if self._projection == INBOX and self._carrying is not None:
            await self._carrying.gap(horizon, first, at)
        live = await self._live_checkpoint(p)
        era = 1 if live is None else live["era"] + (live["epoch"] != horizon.epoch)
        begin = Checkpoint(horizon.epoch, first - 1)

        async def store() -> None:
            async with asking(self._pool, BOOK_SECONDS) as connection:
                await connection.execute(
                    "INSERT INTO projection_checkpoints (projection, version, stream, partition, epoch, era, seq)"
                    " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
                    self._projection,
                    self._version,
                    self._stream(p),
                    p,
                    begin.epoch,
                    era,
                    begin.seq,
                )

        await patiently(store)
        return begin

    async def _live_checkpoint(self, p: int) -> asyncpg.Record | None:
        place = (self._projection, self._live, self._stream(p), p)
        return await patiently(lambda: stored_checkpoint(self._pool, *place, BOOK_SECONDS))

    # --- switching ---------------------------------------------------------------------------------------------------

    async def _switch(self) -> None:
        """Hold the live projector, catch up with it, name the new version."""
        async with asyncio.timeout(SWITCH_SECONDS), self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ALONE)
            await self._check_alone(connection)
            if self._carrying is not None:
                await self._carrying.check_months(connection)
            held = await connection.fetch(
                "SELECT stream, partition, epoch, seq FROM projection_checkpoints"
                " WHERE projection = $1 AND version = $2 ORDER BY partition FOR UPDATE",
                self._projection,
                self._live,
            )
            await self._check_streams()
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

    async def _check_streams(self) -> None:
        """What was folded before a stream was made anew is not what its checkpoint would say."""
        for p, horizon in zip(self._partitions, self._horizons, strict=True):
            if (await self._horizon(p)).epoch != horizon.epoch:
                detail = f"{self._stream(p)} was made anew while {self._projection} was rebuilt"
                raise TopologyError(detail, "Run the rebuild again.")

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
        for table, names in _TABLES[self._projection].items():
            columns = ", ".join(names)
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
