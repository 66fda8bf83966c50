"""What channels have said of a notification, receipt by receipt, from RECEIPTS itself: the tables keep what came of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, NamedTuple

import msgspec

from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from engine.log.incarnations import epoch_of
from seamark.protocol.receipts import PLANNED, Receipt, decode_receipt
from seamark.protocol.subjects import RECEIPTS_STREAM, encode_token, partition_of, receipt_subject

LOOKED_AT_MAX: Final = 2_000
"""Receipts of a user that are looked through for those of one notification, from its dispatch on."""


class Told(NamedTuple):
    """A receipt of a channel. `where`: its place in RECEIPTS."""

    receipt: Receipt
    where: str


FindTold = Callable[[str, str, str, datetime], Awaitable[list[Told]]]
"""`find_told(tenant, user, id, since)`: what channels have said of this notification since; nothing, if it cannot be read."""


def receipts_in(broker: Broker, partitions: int) -> FindTold:
    """Looks for receipts in the stream. It is read from any replica, so the last ones may be missing."""

    async def find(tenant: str, user: str, id: str, since: datetime) -> list[Told]:
        subject = receipt_subject(partition_of(encode_token(tenant), encode_token(user), partitions), tenant, user)
        found: list[Told] = []
        looked_at, begin, start = 0, 0, since
        try:
            epoch = epoch_of(await broker.stream(RECEIPTS_STREAM))
            while looked_at < LOOKED_AT_MAX:
                page = await broker.next_by_subject(RECEIPTS_STREAM, subject, begin, since=start if not begin else None)
                for stored in page.records:
                    begin, looked_at = stored.seq + 1, looked_at + 1
                    receipt = _receipt(stored.payload)
                    if receipt is not None and receipt.id == id and receipt.state != PLANNED:
                        found.append(Told(receipt, f"{RECEIPTS_STREAM} {epoch}.{stored.seq}"))
                if not page.records:
                    break
        except BrokerError:
            pass  # this user of the broker may not look, or nobody answers
        return found

    return find


def _receipt(payload: bytes) -> Receipt | None:
    try:
        return decode_receipt(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
