"""Changes of what decisions know of users: one transaction at a time for each user, each change counted once.

Whoever changes anything of a user (his row, his tokens, his preferences) does it in the block of `Directory.changing`. It holds
the users' rows of `profiles`, so versions never go back and a deletion is never overtaken, and tells caches before and after
(`ProfileMarks`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final, NamedTuple, Protocol
from weakref import WeakValueDictionary

from engine import failpoints
from engine.errors import StoreUnavailable, VersionConflict
from engine.postgres import Connection, Pool, transaction
from seamark.protocol.errors import SeamarkError

CHANGE_SECONDS: Final = 10.0
"""One change; it waits for others of the same users within it. It must stay far below the 60 s for which a profile is marked."""

# In the order of the ids, as everybody does: two changes of the same users never wait for each other.
_HOLD: Final = """
INSERT INTO profiles (tenant, user_id) SELECT $1, id FROM unnest($2::text[]) AS id ORDER BY id COLLATE "C"
ON CONFLICT (tenant, user_id) DO UPDATE SET version = profiles.version
RETURNING user_id, version, deleted_at
"""

IDLE: Final = "SET LOCAL idle_in_transaction_session_timeout = '15s'"
"""Of a process that was stopped in between, PostgreSQL ends the transaction while its marks still stand, and nobody waits on."""

STOPPED_SECONDS: Final = 20.0
"""How much longer than it may a change can have taken, and still be committed: less than its marks last."""

CHANGES_PER_TENANT: Final = 4
"""Changes of one tenant's users under way in one process: each has a connection, and waits with it for whoever holds the same
users, an import for up to a minute. Of a gateway's 8 connections half stay free for other tenants."""

_COUNT: Final = """
UPDATE profiles SET version = version + 1, deleted_at = deletion
FROM unnest($2::text[], $3::timestamptz[]) AS touched (id, deletion)
WHERE tenant = $1 AND user_id = id
"""


class UserDeleted(SeamarkError):
    """The user was deleted, and this change does not make a new one. Nothing was changed.

    Attributes:
        erasing: what he had is still being erased.
    """

    def __init__(self, user: str, *, erasing: bool) -> None:
        super().__init__(
            f"user {user} was deleted, and what he had is still being erased: try again later"
            if erasing
            else f"user {user} was deleted: make him anew first, with PUT /v1/users/{{id}}"
        )
        self.erasing = erasing


class ProfileMarks(Protocol):
    """What caches of profiles have to be told."""

    async def pending(self, tenant: str, users: Sequence[str], seconds: float) -> str:
        """Their profiles may change from now on, for `seconds` and some more. Returns what tells this change from others.

        Raises:
            StoreUnavailable: that cannot be said, so nothing may be changed.
        """

    async def settled(self, tenant: str, users: Sequence[str], token: str) -> None:
        """The outcome is known: committed, or rolled back. Not called where it is unknown, as marks end by themselves."""


class _State(NamedTuple):
    version: int
    deleted_at: datetime | None


def check_version(what: str, expected: int | None, found: int) -> None:
    """Pass a change that was made for the version there is, or for whichever there is (None).

    Raises:
        VersionConflict: it was made for another one.
    """
    if expected is not None and expected != found:
        raise VersionConflict(what, found)


def check_not_stopped(began: float, seconds: float) -> None:
    """Pass a change that may still be committed: it began then, by the monotonic clock, and may take so many seconds.

    Raises:
        StoreUnavailable: it took so long that its marks may have ended.
    """
    if time.monotonic() - began > seconds + STOPPED_SECONDS:
        raise StoreUnavailable("this process was stopped for so long that its marks may have ended")


class ProfileChange:
    """A transaction that may change some users, and is alone with them.

    Attributes:
        connection: in the transaction.
    """

    def __init__(self, connection: Connection, tenant: str, states: Mapping[str, _State]) -> None:
        self.connection, self.tenant = connection, tenant
        self._states = states
        self._touched: dict[str, datetime | None] = {}

    def holds(self, user: str) -> bool:
        """Whether the user is one of those that the transaction holds."""
        return user in self._states

    def deleted_at(self, user: str) -> datetime | None:
        """When the user was deleted, if there is a tombstone of him that this change leaves."""
        return self._touched.get(user, self._states[user].deleted_at)

    def touch(self, user: str) -> int:
        """Count a change of the user, once for the transaction; the version that he gets by it. A tombstone stays one."""
        state = self._states[user]
        self._touched.setdefault(user, state.deleted_at)
        return state.version + 1

    async def check_there(self, user: str) -> None:
        """Pass a user who was not deleted.

        Raises:
            UserDeleted: he was.
        """
        if self.deleted_at(user) is not None:
            raise UserDeleted(user, erasing=await self._erasing(user))

    async def make_anew(self, user: str) -> None:
        """Take the tombstone from a user of whom nothing is left.

        Raises:
            UserDeleted: something may still be.
        """
        if self.deleted_at(user) is not None:
            if await self._erasing(user):
                raise UserDeleted(user, erasing=True)
            await self.connection.execute("DELETE FROM deletions WHERE tenant = $1 AND user_id = $2", self.tenant, user)
            self._touched[user] = None

    async def delete(self, user: str) -> datetime:
        """Leave a tombstone, and have the rest of him erased; when he was deleted, now or before."""
        if (before := self.deleted_at(user)) is not None:
            return before
        at: datetime = await self.connection.fetchval(
            "INSERT INTO deletions (tenant, user_id, deleted_at, due_at) VALUES ($1, $2, now(), now()) RETURNING deleted_at",
            self.tenant,
            user,
        )
        self._touched[user] = at
        return at

    async def _erasing(self, user: str) -> bool:
        statement = "SELECT erased_at IS NULL FROM deletions WHERE tenant = $1 AND user_id = $2"
        return bool(await self.connection.fetchval(statement, self.tenant, user))

    async def count(self) -> None:
        """Store the versions of all that was touched."""
        if self._touched:
            args = self.tenant, list(self._touched), list(self._touched.values())
            await self.connection.execute(_COUNT, *args)


class Directory:
    """The directory of all tenants in one database.

    Args:
        pool: its primary.
        marks: what is told of changes; None: nobody caches profiles.
    """

    def __init__(self, pool: Pool, marks: ProfileMarks | None = None) -> None:
        self.pool, self._marks = pool, marks
        # Each semaphore lives as long as somebody holds it or waits for it.
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def changing(
        self, tenant: str, users: Iterable[str], seconds: float = CHANGE_SECONDS
    ) -> AsyncIterator[ProfileChange]:
        """A transaction for the block, alone with these users. What an error of ours ends is rolled back.

        Raises:
            StoreUnavailable: no answer in time; the outcome may be unknown.
        """
        ids = sorted(set(users))
        async with self._turn(tenant, seconds):
            began = time.monotonic()
            async with self.announced(tenant, ids, seconds), transaction(self.pool, seconds) as connection:
                await connection.execute(IDLE)
                rows = await connection.fetch(_HOLD, tenant, ids)
                states = {row["user_id"]: _State(row["version"], row["deleted_at"]) for row in rows}
                change = ProfileChange(connection, tenant, states)
                yield change
                await change.count()
                check_not_stopped(began, seconds)

    @asynccontextmanager
    async def _turn(self, tenant: str, seconds: float) -> AsyncIterator[None]:
        """One of the tenant's places, waited for in the order of asking.

        Raises:
            StoreUnavailable: none came free in time; nothing was done.
        """
        turn = self._turns.get(tenant)
        if turn is None:
            turn = self._turns[tenant] = asyncio.Semaphore(CHANGES_PER_TENANT)
        try:
            async with asyncio.timeout(seconds):
                await turn.acquire()
        except TimeoutError as error:
            raise StoreUnavailable("too many changes of this tenant's users are under way") from error
        try:
            yield
        finally:
            turn.release()

    @asynccontextmanager
    async def announced(self, tenant: str, users: Sequence[str], seconds: float) -> AsyncIterator[None]:
        """Tell caches that these users may change in the block, which takes `seconds` at most, and when that is over.

        Raises:
            StoreUnavailable: that cannot be told, so nothing may be changed.
        """
        if self._marks is None or not users:
            yield
            return
        token = await self._marks.pending(tenant, users, seconds)
        failpoints.reach("after-marks-before-change")
        try:
            yield
            failpoints.reach("after-change-before-settled")
        except StoreUnavailable:
            raise  # whether it is committed is unknown
        except SeamarkError:
            await self._marks.settled(tenant, users, token)
            raise
        await self._marks.settled(tenant, users, token)

    async def close(self) -> None:
        """Drop the connections, whatever they are doing."""
        self.pool.terminate()
