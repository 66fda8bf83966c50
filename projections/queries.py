"""What others may ask the projections: the gateway reads them through here only."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from redis.asyncio import Redis

from projections.store import Checkpoint
from projections.unread.frames import told
from projections.unread.reader import UnreadReader
from seamark.protocol.frames import Unread
from seamark.protocol.subjects import encode_token, partition_of


class UnreadCount(msgspec.Struct, frozen=True):
    """A user's unread notifications.

    Attributes:
        count: exact; with `more`, that of the newest, and a lower bound of all.
        by_category: of those that have a category.
        as_of: the records up to this position are counted.
        stale: records beyond it may have been stored some time ago.
    """

    count: int
    by_category: dict[str, int]
    as_of: Checkpoint
    stale: bool
    more: bool


class Queries:
    """Reads of all projections.

    Args:
        redis: where the unread counts are.
        partitions: how many there are.
    """

    def __init__(self, redis: Redis, partitions: int) -> None:
        self._partitions = partitions
        self._unread = UnreadReader(redis)

    async def unread(self, tenant: str, user: str) -> UnreadCount | None:
        """What is unread of one user now; None when nothing is known (Redis is empty).

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        tokens = encode_token(tenant), encode_token(user)
        found = await self.unread_of(partition_of(*tokens, self._partitions), [".".join(tokens)])
        return found[0] if found else None

    async def unread_of(self, partition: int, users: Sequence[str]) -> list[UnreadCount]:
        """The same for up to 256 users of a partition (`<tenant>.<user>`, as tokens); empty when nothing is known."""
        counts = await self._unread.read(partition, users)
        checkpoint = counts.checkpoint
        if checkpoint is None:
            return []
        return [UnreadCount(one.count, one.by_category, checkpoint, counts.stale, one.more) for one in counts.users]

    async def close(self) -> None:
        """Drop the connections that are held."""
        await self._unread.close()


def shown(unread: UnreadCount, *, stale: bool = False) -> Unread:
    """The count as a client is told it."""
    return told(unread, unread.as_of.seq, stale=unread.stale or stale)
