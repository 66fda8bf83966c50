"""Builds a new version of the tables beside the live one and switches to it: readers see the one or the other.

What the log no longer holds is carried over from the live version and marked so. While the switch is made, the live
projector waits: its checkpoints are locked, the new version catches up with them, and then one row names the other version.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Final

import structlog

from engine.broker.jetstream import Broker
from engine.errors import InvalidSetting, StoreUnavailable, TopologyError
from engine.outages import postgres_failure
from engine.patience import patiently
from engine.postgres import AWAY, Connection, Pool, asking
from projections.postgres.versions import Place, leaves, live_version, read_place, take_away
from projections.projection import IN_TABLES
from projections.rebuild.carrying import Carrying
from projections.rebuild.folding import Horizon, Partition, Rebuilt, another_rebuild
from projections.replay import Progress, no_progress
from projections.retention.rules import Kept, read_retention
from projections.store import Checkpoint
from projections.stores import STORES

_log = structlog.get_logger("seamark.rebuild")

SWITCH_SECONDS: Final = 60.0
"""For the last part, while the live projector waits."""

SIDE_BY_SIDE: Final = 2
"""Partitions folded at a time: one process and one database have not more to do."""

CAUGHT_UP_SECONDS: Final = 5.0
"""A pass over what came during the one before it: when it took no longer, the rest is little enough for the switch."""

PASSES_MAX: Final = 20
"""Each pass has less to do than the one before it, unless records come faster than they are folded."""

_ALONE: Final = "SELECT pg_advisory_xact_lock(7345252)"
"""Versions are made, switched to and dropped by one rebuild at a time; folding needs no lock."""


class Rebuild:
    """One rebuild of `inbox` or `deliveries`.

    Args:
        tenant: only this tenant's rows; they are exchanged in the live version.
        progress: told how much is carried over, and how far partitions are folded, now and then.
    """

    def __init__(
        self,
        broker: Broker,
        pool: Pool,
        projection: str,
        partitions: int,
        *,
        tenant: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        if projection not in IN_TABLES:
            raise InvalidSetting(f"{projection} is no projection in PostgreSQL")
        self._broker = broker
        self._pool = pool
        self._projection = IN_TABLES[projection]
        self._partitions = [Partition(broker, self._projection, p, progress, tenant) for p in range(partitions)]
        self._tenant = tenant
        self._progress = progress
        self._live = self._version = 0
        self._retention: dict[str, Kept] = {}
        self._horizons: list[Horizon] = []
        self._carrying: Carrying

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
        except AWAY as error:
            raise postgres_failure(error) from error
        try:
            await self._drop_version(self._live if self._tenant is None else self._version)
        except StoreUnavailable as error:
            _log.warning("version_not_dropped", projection=self._projection.name, error=str(error))
        records = sum(one.records for one in self._partitions)
        return Rebuilt(self._projection.name, self._version, records, self._carrying.rows, self._tenant)

    async def _begin(self) -> None:
        """A fresh version; leftovers of a rebuild that did not end are dropped."""
        name = self._projection.name
        async with asyncio.timeout(SWITCH_SECONDS), self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ALONE)
            self._live = await live_version(connection, name)
            existing = [int(leaf.removeprefix(f"{name}_")) for leaf in await leaves(connection, name)]
            for leftover in set(existing) - {self._live}:
                await self._drop_version(leftover)
            self._version = max(existing, default=self._live) + 1
            await connection.execute("SELECT seamark_create_version($1, $2)", name, self._version)
            self._retention = (await read_retention(connection)).tenants

    # --- carrying over -----------------------------------------------------------------------------------------------

    async def _carry(self) -> None:
        """Look where the streams begin, and copy what they no longer hold."""
        self._horizons = [await one.horizon() for one in self._partitions]
        versions = self._live, self._version
        self._carrying = Carrying(self._pool, self._projection, *versions, self._tenant, self._progress)
        live = [await patiently(self._live_place, one) for one in self._partitions]
        formerly = any(
            place is not None and (place.era > 1 or place.checkpoint.epoch != horizon.epoch)
            for place, horizon in zip(live, self._horizons, strict=True)
        )
        if self._projection.kind == "log":
            await self._carrying.records(self._horizons, formerly=formerly)
        elif formerly or any(one.trimmed for one in self._horizons):  # else the stream holds all there ever was
            stream, subject = self._projection.stream(0), f"{self._projection.kind}.>"
            oldest = await patiently(self._broker.leader_next, stream, subject, 1)
            await self._carrying.receipts(datetime.fromisoformat(oldest.time) if oldest is not None else None)

    async def _live_place(self, one: Partition) -> Place | None:
        async with asking(self._pool) as connection:
            return await read_place(connection, self._projection.name, one.stream, one.number, self._live)

    # --- folding -----------------------------------------------------------------------------------------------------

    async def _fold_until_caught_up(self) -> None:
        """The whole log, then what has come meanwhile, until that is so little that a projector can wait for the rest."""
        for _ in range(PASSES_MAX):
            began = time.monotonic()
            await self._fold_all()
            if time.monotonic() - began < CAUGHT_UP_SECONDS:
                return
        _log.warning("rebuild_does_not_catch_up", projection=self._projection.name, passes=PASSES_MAX)

    async def _fold_all(self) -> None:
        """Every partition up to its end; while PostgreSQL writes for one, another is folded."""
        slots = asyncio.Semaphore(SIDE_BY_SIDE)

        async def fold(one: Partition) -> None:
            async with slots:
                await self._fold(one, await self._target(one))

        try:
            async with asyncio.TaskGroup() as tasks:
                for one in self._partitions:
                    tasks.create_task(fold(one), name=f"rebuild {self._projection.name} {one.number}")
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _target(self, one: Partition) -> int:
        """Up to where to fold. Rows that go into the live version must not be ahead of it: it would fold over them again."""
        head = await one.head()
        if self._tenant is None:
            return head
        live = await patiently(self._live_place, one)
        if live is not None and live.checkpoint.epoch != self._horizons[one.number].epoch:
            detail = f"{self._projection.name} was folded from another incarnation of {one.stream}"
            raise TopologyError(detail, f"Run `seamark rebuild {self._projection.name}`.")
        return min(head, live.checkpoint.seq) if live is not None else 0

    async def _fold(self, one: Partition, target: int) -> None:
        """Fold up to `target`; the first time from the oldest record there is."""
        if target == 0 and await one.head():
            return  # something has come: the next round folds it
        horizon = self._horizons[one.number]

        async def begin(first: int, at: datetime) -> Checkpoint:
            """What age has taken from the log since the horizon was looked at is carried over, too."""
            if self._projection.kind == "log":
                await self._carrying.gap(horizon, first, at)
            checkpoint = Checkpoint(horizon.epoch, first - 1)
            await patiently(self._store_first, one, checkpoint)
            return checkpoint

        store = STORES[self._projection.name](self._pool, one.number, version=self._version)
        await one.fold(store, target, horizon.oldest, begin)

    async def _store_first(self, one: Partition, begin: Checkpoint) -> None:
        """Store where the fold begins. Rows of another epoch than the live one's begin a new era."""
        live = await patiently(self._live_place, one)
        era = 1 if live is None else live.era + (live.checkpoint.epoch != begin.epoch)
        async with asking(self._pool) as connection:
            await connection.execute(
                "INSERT INTO projection_checkpoints (projection, version, stream, partition, epoch, seq, era)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
                self._projection.name,
                self._version,
                one.stream,
                one.number,
                *begin,
                era,
            )

    # --- switching ---------------------------------------------------------------------------------------------------

    async def _switch(self) -> None:
        """Hold the live projector, catch up with it, name the new version."""
        name = self._projection.name
        async with asyncio.timeout(SWITCH_SECONDS), self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ALONE)
            await self._check_unchanged(connection)
            held = await connection.fetch(
                "SELECT partition, epoch, seq FROM projection_checkpoints"
                " WHERE projection = $1 AND version = $2 ORDER BY partition FOR UPDATE",
                name,
                self._live,
            )
            await self._check_streams()
            for row in held:
                await self._catch_up(row["partition"], Checkpoint(row["epoch"], row["seq"]))
            # Rows of before and after would leave by two rules. Until this ends nobody sets another time.
            await connection.execute("LOCK TABLE retention IN ROW SHARE MODE")
            if (await read_retention(connection)).tenants != self._retention:
                raise TopologyError("a retention was set while the tables were rebuilt", "Run the rebuild again.")
            if self._tenant is not None:
                await self._exchange(connection, self._tenant)
                return
            await connection.execute(
                "UPDATE projection_versions SET version = $2, switched_at = now() WHERE projection = $1",
                name,
                self._version,
            )
            # A batch that waits for the former version finds no checkpoint: it would be lost there, and hinder the drop.
            await connection.execute(
                "DELETE FROM projection_checkpoints WHERE projection = $1 AND version = $2", name, self._live
            )

    async def _check_unchanged(self, connection: Connection) -> None:
        """Whoever began later has dropped this version, or whoever was quicker the one it was to follow."""
        live = await live_version(connection, self._projection.name)
        mine = await connection.fetchval("SELECT to_regclass($1)::text", f"{self._projection.name}_{self._version}")
        if live != self._live or mine is None:
            raise another_rebuild()
        if self._projection.kind == "log":
            await self._carrying.check_months(connection)

    async def _check_streams(self) -> None:
        """What was folded before a stream was made anew is not what its checkpoint would say."""
        for one, horizon in zip(self._partitions, self._horizons, strict=True):
            if (await one.horizon()).epoch != horizon.epoch:
                detail = f"{one.stream} was made anew while {self._projection.name} was rebuilt"
                raise TopologyError(detail, "Run the rebuild again.")

    async def _catch_up(self, p: int, live: Checkpoint) -> None:
        one = self._partitions[p]
        async with asking(self._pool) as connection:
            at = await read_place(connection, self._projection.name, one.stream, p, self._version)
        if at is None or (at.checkpoint.epoch == live.epoch and at.checkpoint.seq < live.seq):
            await self._fold(one, min(live.seq, await one.head()))

    async def _exchange(self, connection: Connection, tenant: str) -> None:
        """One tenant's rows, in the live version."""
        for table in self._projection.tables:
            columns = ", ".join((*table.columns, *table.beside, *(["kept_until"] if table.by_months else [])))
            await connection.execute(
                f"DELETE FROM {table.name} WHERE version = {self._live} AND tenant = $1", tenant, timeout=SWITCH_SECONDS
            )
            await connection.execute(
                f"INSERT INTO {table.name} ({columns}, version) SELECT {columns}, {self._live} FROM {table.name}"
                f" WHERE version = {self._version} AND tenant = $1",
                tenant,
                timeout=SWITCH_SECONDS,
            )

    async def _drop_version(self, version: int) -> None:
        """Drop what is no longer read. What somebody looks at for long, a backup perhaps, goes with the next rebuild."""

        async def drop(connection: Connection) -> bool:
            await connection.execute("SELECT seamark_drop_version($1, $2)", self._projection.name, version)
            return True

        if not await take_away(self._pool, drop):
            _log.warning("version_not_dropped", projection=self._projection.name, version=version)
