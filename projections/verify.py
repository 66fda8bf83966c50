"""Recomputes a projection from its streams with the pure fold and names every difference to what is stored.

Rows and checkpoints are read in one view of the database, and the streams are folded up to those very checkpoints, so a
projector at work makes no difference. What streams no longer hold cannot be recomputed, and is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.errors import TopologyError
from engine.incarnations import stream_of
from engine.jetstream import Broker
from engine.partition import Delivered
from engine.subjects import RECEIPTS_STREAM, log_stream
from projections.deliveries import DELIVERIES, EARLIEST
from projections.delivery_state import Delivery, Receipts
from projections.delivery_state import fold as fold_receipts
from projections.inbox import INBOX
from projections.inbox_fold import Row, User, UserChanges, decoded
from projections.inbox_fold import fold as fold_inbox
from projections.postgres import AWAY, away
from projections.replay import replay

if TYPE_CHECKING:
    from projections.postgres import Connection, Pool

_FIELDS: Final = tuple(field.name for field in fields(Row) if field.name not in ("record", "tenant", "user_id", "id"))
_LIVE: Final = "(SELECT version FROM projection_versions WHERE projection = '{0}')"
_FETCHED: Final = 1000
LOCK_SECONDS: Final = 10.0


class Difference(msgspec.Struct, omit_defaults=True):
    """One thing that is stored otherwise than the streams say. `stored` or `expected` None: there is none."""

    what: str
    key: list[str]
    field: str | None = None
    stored: Any = None
    expected: Any = None


class Verified(msgspec.Struct):
    """What a verification has looked at; the differences themselves were handed out before."""

    projection: str
    compared: int = 0
    differences: int = 0
    not_verifiable: int = 0


class Verification:
    """One verification of `inbox` or `deliveries`; iterate over `differences`, then look at `result`."""

    def __init__(self, broker: Broker, pool: Pool, projection: str, partitions: int) -> None:
        self._broker = broker
        self._pool = pool
        self._partitions = partitions
        self.result = Verified(projection)

    async def differences(self) -> AsyncIterator[Difference]:
        """Every difference there is.

        Raises:
            StoreUnavailable, BrokerError: it could not be told. TopologyError: another incarnation of a stream.
        """
        compare = self._inbox if self.result.projection == INBOX else self._deliveries
        async with self._view() as connection:
            async for difference in compare(connection):
                self.result.differences += 1
                yield difference

    @asynccontextmanager
    async def _view(self) -> AsyncIterator[Connection]:
        """One view of the database, for as long as it takes."""
        try:
            async with self._pool.acquire() as connection:
                await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                # A version that a rebuild drops is gone from every view of the database that does not hold it.
                tables = "inbox" if self.result.projection == INBOX else "deliveries, delivery_ranges"
                await connection.execute(f"LOCK TABLE {tables} IN ACCESS SHARE MODE", timeout=LOCK_SECONDS)
                yield connection
                await connection.execute("COMMIT")
        except AWAY as error:
            raise away(error) from error

    async def _checkpoint(self, connection: Connection, stream: str, partition: int) -> tuple[str, int, int] | None:
        """Epoch, sequence and era."""
        row = await connection.fetchrow(
            "SELECT epoch, seq, era FROM projection_checkpoints WHERE projection = $1 AND stream = $2 AND partition = $3"
            f" AND version = {_LIVE.format(self.result.projection)}",
            self.result.projection,
            stream,
            partition,
        )
        if row is None:
            return None
        state = await stream_of(self._broker, stream)
        if state.epoch != row["epoch"]:
            raise TopologyError(
                f"{self.result.projection} was folded from another incarnation of {stream}",
                f"Run `seamark rebuild {self.result.projection}`.",
            )
        return row["epoch"], row["seq"], row["era"]

    async def _target(self, stream: str, subject: str, seq: int) -> int:
        newest = await self._broker.leader_last(stream, subject)
        return min(seq, newest.seq) if newest is not None else 0

    # --- inbox -------------------------------------------------------------------------------------------------------

    async def _inbox(self, connection: Connection) -> AsyncIterator[Difference]:
        for p in range(self._partitions):
            stream, subject = log_stream(p), f"log.{p}.>"
            at = await self._checkpoint(connection, stream, p)
            if at is None:
                continue
            epoch, seq, era = at
            users: dict[User, UserChanges] = {}
            oldest = seq + 1
            async for batch in replay(self._broker, stream, subject, 1, await self._target(stream, subject, seq)):
                oldest = min(oldest, batch[0].seq)
                entries = [(user, _light(stored), entry) for user, stored, entry in decoded(batch)]
                fold_inbox(entries, epoch, era, users=users)
            async for difference in self._compare_inbox(connection, epoch, era, oldest, users):
                yield difference

    async def _compare_inbox(
        self, connection: Connection, epoch: str, era: int, oldest: int, users: dict[User, UserChanges]
    ) -> AsyncIterator[Difference]:
        live = _LIVE.format(INBOX)
        async for stored in connection.cursor(
            f"SELECT * FROM inbox WHERE version = {live} AND epoch = $1", epoch, prefetch=_FETCHED
        ):
            if stored["seq"] < oldest:
                self.result.not_verifiable += 1
                continue
            key = [stored["tenant"], stored["user_id"], stored["id"]]
            changes = users.get((key[0], key[1]))
            expected = changes.rows.pop(key[2], None) if changes is not None else None
            self.result.compared += 1
            if expected is None:
                yield Difference("inbox row that the log does not give", key, stored=stored["seq"])
                continue
            for name in _FIELDS:
                if stored[name] != getattr(expected, name):
                    yield Difference("inbox", key, name, stored[name], getattr(expected, name))
            if hashlib.sha256(bytes(stored["record"])).digest() != expected.record:
                yield Difference("inbox", key, "record", "other bytes than the log holds")
        for (tenant, user), changes in users.items():
            for id, row in changes.rows.items():
                older = await connection.fetchval(
                    f"SELECT seq FROM inbox WHERE version = {live} AND tenant = $1 AND user_id = $2 AND id = $3"
                    " AND (era < $4 OR seq < $5)",
                    tenant,
                    user,
                    id,
                    era,
                    oldest,
                )
                if older is None:
                    yield Difference("inbox row is missing", [tenant, user, id], expected=row.seq)

    # --- deliveries --------------------------------------------------------------------------------------------------

    async def _deliveries(self, connection: Connection) -> AsyncIterator[Difference]:
        folded = Receipts({}, {}, {})
        for p in range(self._partitions):
            at = await self._checkpoint(connection, RECEIPTS_STREAM, p)
            if at is None:
                continue
            target = await self._target(RECEIPTS_STREAM, f"rcpt.{p}.>", at[1])
            async for batch in replay(self._broker, RECEIPTS_STREAM, f"rcpt.{p}.>", 1, target):
                fold_receipts(batch, folded)
        oldest = await self._broker.leader_next(RECEIPTS_STREAM, "rcpt.>", 1)
        horizon = "false" if oldest is None else f"{{0}} >= '{oldest.time}'::timestamptz + interval '5 minutes'"
        trimmed = oldest is None or oldest.seq > 1
        for table, columns, expected in self._tables(folded):
            verifiable = horizon.format(EARLIEST[table]) if trimmed else "true"
            async for difference in self._compare(connection, table, columns, expected, verifiable):
                yield difference

    def _tables(self, folded: Receipts) -> Iterable[tuple[str, list[str], dict[tuple[Any, ...], dict[str, Any]]]]:
        names = [field.name for field in fields(Delivery)]
        yield (
            "deliveries",
            ["tenant", "user_id", "id", "channel", "device"],
            {key: {name: getattr(one, name) for name in names} for key, one in folded.deliveries.items()},
        )
        yield (
            "delivery_ranges",
            ["tenant", "user_id", "epoch", "up_to", "after_seq", "device", "channel", "state"],
            {key: {"at": one[8], "sent_at": one[9]} for key, one in folded.ranges.items()},
        )
        yield (
            "device_cursors",
            ["tenant", "user_id", "device"],
            {key: {"epoch": one.epoch, "seq": one.seq, "at": one.at} for key, one in folded.cursors.items()},
        )

    async def _compare(
        self,
        connection: Connection,
        table: str,
        columns: list[str],
        expected: dict[tuple[Any, ...], dict[str, Any]],
        verifiable: str,
    ) -> AsyncIterator[Difference]:
        statement = f"SELECT *, {verifiable} AS verifiable FROM {table} WHERE version = {_LIVE.format(DELIVERIES)}"
        async for stored in connection.cursor(statement, prefetch=_FETCHED):
            key = tuple(stored[name] for name in columns)
            wanted = expected.pop(key, None)
            if not stored["verifiable"]:
                self.result.not_verifiable += 1
                continue
            self.result.compared += 1
            if wanted is None:
                yield Difference(f"{table} row that no receipt gives", _words(key))
                continue
            for name, value in wanted.items():
                if stored[name] != value:
                    yield Difference(table, _words(key), name, stored[name], value)
        for key in expected:
            yield Difference(f"{table} row is missing", _words(key))


def _light(stored: Delivered) -> Delivered:
    """The record with a digest in place of its bytes: those of a whole log would fill memory."""
    return msgspec.structs.replace(stored, payload=hashlib.sha256(stored.payload).digest())


def _words(key: tuple[Any, ...]) -> list[str]:
    return [str(part) for part in key]
