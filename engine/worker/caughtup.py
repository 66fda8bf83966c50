"""What the tables know of notifications, once they know everything that was stored before this moment.

The tables lag behind the streams. Whoever asks them whether somebody has read a notification first asks the leaders of LOG and
RECEIPTS where the user's last messages are, and waits until the projections have passed these.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from engine.broker.jetstream import Broker
from engine.log.incarnations import epoch_of
from seamark.protocol.subjects import (
    RECEIPTS_STREAM,
    encode_token,
    encode_user,
    log_stream,
    log_subject,
    partition_of,
    receipt_subject,
)

PASS_SECONDS: Final = 0.8
"""How long a job waits for the projections before it is put back: they are mostly a tenth of a second behind."""

LOOK_SECONDS: Final = 0.1

BEHIND_SECONDS: Final = 5.0
"""After a wait in vain nobody waits for so long: each who does holds one of a worker's places, and they stand still for all."""

PUT_BACK_SECONDS: Final = 2.0
"""When a job is handed out again because they were too far behind for it."""


class Place(NamedTuple):
    """A message of a stream in its incarnation `epoch`; 0: there was none."""

    epoch: str
    seq: int


class Heads(NamedTuple):
    """The last messages about a user in the log and among the receipts of its partition."""

    partition: int
    log: Place
    receipts: Place


class Known(NamedTuple):
    """What the tables know of a notification.

    Attributes:
        channels: those that its record names.
        seen: a device has shown it, or somebody said so by another channel.
        trace: its `traceparent`, where it was looked up as a member of a digest; "": it has none.
        attempts: the highest number of a try that receipts name, where it was looked up as a member of a digest.
    """

    id: str
    stored_at: datetime
    type: str
    category: str | None
    channels: tuple[str, ...]
    expires_at: datetime | None
    transaction: str | None
    seen: bool
    read: bool
    archived: bool
    recalled: bool
    superseded: bool
    trace: str = ""
    attempts: int = 0


class Tables(Protocol):
    """The projections `inbox` and `deliveries`. Every call raises StoreUnavailable where there is no answer in time."""

    async def passed(self, heads: Heads) -> bool:
        """Whether both projections hold everything up to these."""

    async def known(self, tenant: str, user: str, ids: Sequence[str]) -> list[Known]:
        """Of these notifications those that there are, newest first."""

    async def planned(
        self, tenant: str, user: str, channel: str, when: str, since: datetime, limit: int
    ) -> list[Known]:
        """The notifications stored since then that were planned so and have not ended; newest first."""

    async def records(self, tenant: str, user: str, ids: Sequence[str]) -> dict[str, bytes]:
        """Their records as the log had them, by id."""


class CaughtUp:
    """Tells whether the tables know everything about a user.

    Args:
        partitions: how many logs there are.
    """

    def __init__(self, broker: Broker, tables: Tables, partitions: int) -> None:
        self._broker = broker
        self._tables = tables
        self._partitions = partitions
        self._behind_until: dict[int, float] = {}

    async def knows_all_of(self, tenant: str, user: str) -> bool:
        """Wait for a moment until everything is known that was stored of a user before this call; whether it is.

        Raises:
            BrokerError, StoreUnavailable: nobody can tell.
        """
        heads, deadline = await self.heads(tenant, user), time.monotonic() + PASS_SECONDS
        while not await self._tables.passed(heads):
            now = time.monotonic()
            if now > deadline:
                self._behind_until[heads.partition] = now + BEHIND_SECONDS
            if now < self._behind_until.get(heads.partition, 0.0):
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    async def heads(self, tenant: str, user: str) -> Heads:
        """Where the user's last messages are, by the leaders.

        The incarnation is asked afterwards: of a stream that is made anew in between, more is then waited for, and not less.
        """
        partition = partition_of(encode_token(tenant), encode_user(user), self._partitions)
        log = log_stream(partition)
        record, receipt = await asyncio.gather(
            self._broker.leader_last(log, log_subject(partition, tenant, user)),
            self._broker.leader_last(RECEIPTS_STREAM, receipt_subject(partition, tenant, user)),
        )
        of_log, of_receipts = await asyncio.gather(self._broker.stream(log), self._broker.stream(RECEIPTS_STREAM))
        return Heads(
            partition,
            Place(epoch_of(of_log), 0 if record is None else record.seq),
            Place(epoch_of(of_receipts), 0 if receipt is None else receipt.seq),
        )
