"""Erasing users who were deleted: streams, rows and counts, until nothing is left and nothing from before can arrive.

A deletion is a row of `deletions`, and one projector at a time makes passes over the users that are due. Each pass takes away all
that is there. It is made again because much may be on its way: an event that was accepted before the deletion and is dispatched
after it, a batch that a projector had read before the log was purged, a receipt of a device. A user is erased when a pass finds
nothing, half a minute after the one before, and no event from before the deletion waits. Until the tombstone ends he is looked at
once a day all the same: whatever arrives late, by a way that nobody thought of, does not stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
import structlog
from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.directory.changing import IDLE
from engine.directory.users import forget_user
from engine.dispatch.source import SOURCES, EventSource
from engine.errors import BrokerError, StoreUnavailable, TopologyError
from engine.limits import TOMBSTONE_SECONDS
from engine.log.incarnations import epoch_of
from engine.log.marks import decode_mark
from engine.postgres import AWAY, Connection, Pool, asking, holding, transaction
from projections.unread.store import asked, key_prefix, read_version
from seamark.protocol.subjects import (
    DEAD_LETTERS_STREAM,
    RECEIPTS_STREAM,
    UserSubjects,
    encode_token,
    log_stream,
    partition_of,
    user_subjects,
)

_log = structlog.get_logger("seamark.erasure")

LOCK: Final = 0x5EA_3A2B
"""Advisory lock: one projector of all makes the passes."""

EVERY_SECONDS: Final = 2.0
ROUND_SECONDS: Final = 120.0
AT_ONCE: Final = 50
"""Users of one round. Tenants take turns: one that has a million deleted at once keeps no other waiting."""

AGAIN_SECONDS: Final = (5, 30, 60, 300)
"""After the first passes, until the user is erased; then always the last."""

SETTLED_SECONDS: Final = 30.0
"""How long after a pass the next one must find nothing. A batch that a projector had read by then is folded, or refused."""

FAILED_SECONDS: Final = 60
"""After a pass that failed, until the next one. Others are erased meanwhile: a log may be away, or a user have too many rows."""

DAILY: Final = timedelta(days=1)
SWEEP_SECONDS: Final = 30.0

ERASED: Final = b'{"op":"erased"}'
"""What is published on a user's live subject once his log and rows are gone: his devices replace what they show."""

NOT_ERASED: Final = ("profiles", "deletions")
"""Tables with the tombstone: an id, a number and two times."""

# Hops from tenant to tenant by the key, so that it reads a few rows of each, however many are due.
_DUE: Final = """
WITH RECURSIVE tenants AS (
    SELECT min(tenant) AS tenant FROM deletions
    UNION ALL SELECT (SELECT min(d.tenant) FROM deletions d WHERE d.tenant > t.tenant) FROM tenants t WHERE t.tenant IS NOT NULL
)
SELECT d.tenant, user_id, deleted_at, passes, bounds::text, erased_at, now() AS now
FROM tenants t CROSS JOIN LATERAL (
    SELECT *, row_number() OVER (ORDER BY due_at) AS turn FROM deletions
    WHERE tenant = t.tenant AND due_at <= now() ORDER BY due_at LIMIT $1
) d
ORDER BY turn, due_at LIMIT $1
"""

# Whatever has a tenant and a user is his: a table that is added later is erased without anybody thinking of it.
_TABLES: Final = """
SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = current_schema() AND NOT c.relname = ANY($1)
AND 2 = (SELECT count(*) FROM pg_attribute WHERE attrelid = c.oid AND attname IN ('tenant', 'user_id') AND NOT attisdropped)
ORDER BY 1
"""

# A campaign that is not over names its users; one that is over has no names any more.
_NAMED: Final = "tenant = $1 AND finished_at IS NULL AND ($2 = ANY(users) OR $2 = ANY(exclude_users))"
_UNNAME: Final = f"""
UPDATE campaigns SET users = array_remove(users, $2), exclude_users = array_remove(exclude_users, $2) WHERE {_NAMED}
"""

_TOMBSTONE: Final = "SELECT deleted_at FROM profiles WHERE tenant = $1 AND user_id = $2 FOR UPDATE"

_POSTPONE: Final = """
UPDATE deletions SET due_at = now() + $3 * interval '1 second' WHERE tenant = $1 AND user_id = $2 AND deleted_at = $4
"""

_AFTER_PASS: Final = """
UPDATE deletions SET passes = passes + 1, due_at = now() + $3::interval, bounds = $4, erased_at = coalesce(erased_at, $5)
WHERE tenant = $1 AND user_id = $2 AND deleted_at = $6
"""


class Deletion(msgspec.Struct, frozen=True):
    """A user who was deleted, and how far he is erased.

    Args:
        bounds: the incarnation of each source and its last sequence when the first pass was made: what is behind it came later.
    """

    tenant: str
    user: str
    deleted_at: datetime
    passes: int = 0
    bounds: Mapping[str, tuple[str, int]] = {}
    erased_at: datetime | None = None


class Eraser:
    """Makes passes over deleted users."""

    def __init__(self, broker: Broker, redis: Redis, pool: Pool, partitions: int) -> None:
        self._broker, self._redis, self._pool, self._partitions = broker, redis, pool, partitions

    async def run(self) -> None:
        """Erase for ever; ends by cancellation. What fails is said, and tried again."""
        while True:
            try:
                async with asyncio.timeout(ROUND_SECONDS):
                    if await self._anybody_due():  # the lock costs a connection
                        async with holding(self._pool, LOCK) as mine:
                            if mine is not None:
                                await self.round()
            except (BrokerError, TopologyError, StoreUnavailable, *AWAY) as error:
                _log.warning("users_not_erased", why=str(error)[:200] or type(error).__name__)
            except Exception:
                # Without this task nobody is ever erased; what we did not foresee must not end it.
                _log.exception("users_not_erased")
            await asyncio.sleep(EVERY_SECONDS)

    async def _anybody_due(self) -> bool:
        async with asking(self._pool) as connection:
            return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM deletions WHERE due_at <= now())"))

    async def round(self) -> int:
        """One pass over each user who is due; how many these were. One whose pass fails has another in a minute.

        Raises:
            StoreUnavailable: ask again.
        """
        async with asking(self._pool) as connection:
            rows = await connection.fetch(_DUE, AT_ONCE)
        for row in rows:
            try:
                await self._look_after(row)
            except (BrokerError, TopologyError, StoreUnavailable) as error:
                why = str(error)[:200] or type(error).__name__
                _log.warning("user_not_erased", passes=row["passes"], why=why)
                await self._postpone(row)
            except Exception as error:
                # A fault of ours must not look like an outage, and keeps nobody waiting but whom it meets.
                _log.exception("user_not_erased", passes=row["passes"], why=type(error).__name__)
                await self._postpone(row)
        return len(rows)

    async def _look_after(self, row: Any) -> None:
        deletion = Deletion(
            row["tenant"],
            row["user_id"],
            row["deleted_at"],
            row["passes"],
            msgspec.json.decode(row["bounds"], type=dict[str, tuple[str, int]]) if row["bounds"] else {},
            row["erased_at"],
        )
        ended = (row["now"] - deletion.deleted_at).total_seconds() > TOMBSTONE_SECONDS
        if ended and deletion.erased_at is not None:
            await self._forget(deletion)
        else:
            await self._pass(deletion, row["now"])

    async def _postpone(self, row: Any) -> None:
        async with asking(self._pool) as connection:
            args = row["tenant"], row["user_id"], FAILED_SECONDS, row["deleted_at"]
            await connection.execute(_POSTPONE, *args)

    async def _pass(self, deletion: Deletion, now: datetime) -> None:
        """Take away all that is there, then note when to come again."""
        tenant, user = deletion.tenant, deletion.user
        bounds = {source.stream: deletion.bounds.get(source.stream) or await self._end(source) for source in SOURCES}
        waits = not await self._dispatched(bounds)  # asked before: what is dispatched meanwhile is found by this pass
        found = await self.take_away(deletion)
        if found is None:
            return
        gone = not found and not waits and deletion.passes > 0
        again = DAILY if gone or deletion.erased_at else timedelta(seconds=_again(deletion.passes))
        if found or deletion.passes == 0:
            self._broker.publish(self._subjects(tenant, user).live, ERASED)
        # Whoever finds nothing right after another pass cannot know that nothing is under way.
        erased_at = now if gone and _again(deletion.passes - 1) >= SETTLED_SECONDS else None
        if gone and erased_at is None and deletion.erased_at is None:
            again = timedelta(seconds=SETTLED_SECONDS)
        async with asking(self._pool) as connection:
            args = again, msgspec.json.encode(bounds).decode(), erased_at, deletion.deleted_at
            await connection.execute(_AFTER_PASS, tenant, user, *args)
        _log.info(
            "user_erased" if erased_at else "user_pass",
            passes=deletion.passes + 1,
            waits=waits,
            found=sum(found.values()),
        )

    async def take_away(self, deletion: Deletion) -> dict[str, int] | None:
        """Take away all that there is of a user; how much it was, by place. Places without anything are left out.

        All of it happens while his row of `profiles` is held: one who is made anew loses nothing. None: that has happened.
        Streams go first: what is folded from them meanwhile is gone with the rows, or found by the next pass.
        """
        tenant, user = deletion.tenant, deletion.user
        at, log = self._subjects(tenant, user), log_stream(self._partition(tenant, user))
        async with transaction(self._pool, SWEEP_SECONDS) as connection:
            await connection.execute(IDLE)
            if await connection.fetchval(_TOMBSTONE, tenant, user) != deletion.deleted_at:
                return None
            found = {
                log: await self._purge(log, at.log),
                RECEIPTS_STREAM: await self._purge(RECEIPTS_STREAM, at.receipts),
                DEAD_LETTERS_STREAM: await self._purge(DEAD_LETTERS_STREAM, at.letters),
            }
            found["directory"] = await forget_user(connection, tenant, user)
            found["campaigns"] = int((await connection.execute(_UNNAME, tenant, user)).rpartition(" ")[2])
            for table in await _tables(connection):
                done = await connection.execute(f"DELETE FROM {table} WHERE tenant = $1 AND user_id = $2", tenant, user)
                found[table] = int(done.rpartition(" ")[2])
            found["Redis"] = await asked(self._redis.unlink(*await self._keys(tenant, user)))
            await self._forget_due(tenant, user)
        return {place: many for place, many in found.items() if many}

    async def remains(self, tenant: str, user: str) -> dict[str, int]:
        """How much there is of a user, by place; places without anything are left out. Nothing is changed."""
        at, log = self._subjects(tenant, user), log_stream(self._partition(tenant, user))
        found = {
            log: await self._messages(log, at.log),
            RECEIPTS_STREAM: await self._messages(RECEIPTS_STREAM, at.receipts),
            DEAD_LETTERS_STREAM: await self._messages(DEAD_LETTERS_STREAM, at.letters),
            "Redis": await asked(self._redis.exists(*await self._keys(tenant, user))),
        }
        async with asking(self._pool, SWEEP_SECONDS) as connection:
            found["campaigns"] = await connection.fetchval(
                f"SELECT count(*) FROM campaigns WHERE {_NAMED}", tenant, user
            )
            for table in await _tables(connection):
                statement = f"SELECT count(*) FROM {table} WHERE tenant = $1 AND user_id = $2"
                found[table] = await connection.fetchval(statement, tenant, user)
        return {place: many for place, many in found.items() if many}

    async def _purge(self, stream: str, subject: str) -> int:
        answer = await self._broker.api(f"STREAM.PURGE.{stream}", {"filter": subject})
        return int(answer.get("purged", 0))

    async def _messages(self, stream: str, subject: str) -> int:
        answer = await self._broker.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})
        subjects: Mapping[str, int] = answer["state"].get("subjects") or {}
        return sum(subjects.values())

    async def _keys(self, tenant: str, user: str) -> list[str]:
        """Keys of the user's counts, of the version that is read and of one that may be built beside it."""
        version, token = await read_version(self._redis), f"{encode_token(tenant)}.{encode_token(user)}"
        p = self._partition(tenant, user)
        return [f"{key_prefix(p, v)}{kind}:{token}" for v in (version, version + 1) for kind in "scxdr"]

    async def _forget_due(self, tenant: str, user: str) -> None:
        version, token = await read_version(self._redis), f"{encode_token(tenant)}.{encode_token(user)}"
        for v in (version, version + 1):
            await asked(self._redis.zrem(f"{key_prefix(self._partition(tenant, user), v)}due", token))

    async def _end(self, source: EventSource) -> tuple[str, int]:
        state = await self._broker.stream(source.stream)
        return epoch_of(state), state.last_seq

    async def _dispatched(self, bounds: Mapping[str, tuple[str, int]]) -> bool:
        """Whether no event up to the bounds waits to be dispatched, in any partition: others' events may name the user, too.

        A source in another incarnation counts as dispatched: its dispatchers stop until an operator says what the positions mean.
        """
        for source in SOURCES:
            epoch, last = bounds[source.stream]
            for q in range(self._partitions):
                marked = source.marked(q, q)
                placed = await self._broker.leader_last(marked.name, marked.subject)
                mark = None if placed is None else decode_mark(placed.payload)
                if mark is not None and mark.epoch != epoch:
                    continue
                after = 1 if mark is None else mark.next_seq
                waiting = await self._broker.leader_next(source.stream, source.partition(q).subject, after)
                if waiting is not None and waiting.seq <= last:
                    return False
        return True

    async def _forget(self, deletion: Deletion) -> None:
        """The tombstone has ended: nothing says any more that there was such a user. One last pass comes before."""
        if await self.take_away(deletion):
            _log.warning("erased_user_found_again")
        async with transaction(self._pool) as connection:
            for statement in (
                "DELETE FROM profiles WHERE tenant = $1 AND user_id = $2 AND deleted_at = $3",
                "DELETE FROM deletions WHERE tenant = $1 AND user_id = $2 AND deleted_at = $3",
            ):
                await connection.execute(statement, deletion.tenant, deletion.user, deletion.deleted_at)

    def _partition(self, tenant: str, user: str) -> int:
        return partition_of(encode_token(tenant), encode_token(user), self._partitions)

    def _subjects(self, tenant: str, user: str) -> UserSubjects:
        return user_subjects(self._partition(tenant, user), tenant, user)


async def find_deletion(pool: Pool, tenant: str, user: str) -> Deletion | None:
    """The deletion of a user, if he was deleted within the last 31 days."""
    async with asking(pool) as connection:
        row: Any = await connection.fetchrow(
            "SELECT deleted_at, passes, erased_at FROM deletions WHERE tenant = $1 AND user_id = $2", tenant, user
        )
    return None if row is None else Deletion(tenant, user, row["deleted_at"], row["passes"], {}, row["erased_at"])


def _again(passes: int) -> int:
    """In how many seconds to come again after so many passes before this one."""
    return AGAIN_SECONDS[min(max(passes, 0), len(AGAIN_SECONDS) - 1)]


async def _tables(connection: Connection) -> list[str]:
    return [row[0] for row in await connection.fetch(_TABLES, list(NOT_ERASED))]
