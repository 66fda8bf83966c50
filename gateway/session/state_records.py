"""Writes the `read` and `archive` records that users ask for, over whichever carrier.

What one device asks for within a quarter of a second becomes one record. Otherwise a user who clicks through a list would
cost the log, and every device that follows it, a record for each click.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from engine.broker.jetstream import Broker
from engine.errors import BrokerError, Unavailable
from engine.tasks import Tasks
from gateway import metrics
from gateway.access.allowances import Allowances
from gateway.limits import (
    READ_IDS,
    STATE_BUDGET_SECONDS,
    STATE_PAUSE_SECONDS,
    STATE_REQUESTS_WAITING,
    STORED_OVERHEAD_BYTES,
)
from seamark.protocol.records import EPOCH_HEADER, state_record
from seamark.protocol.subjects import log_subject

Kind = Literal["read", "archive"]

_WHY: Final = {
    "user": "this user has had too many read and archive records stored: name more records in fewer requests (`up_to` is the"
    " shortest way), and try again later",
    "tenant": "the users of this tenant have used up its share of the log for read and archive records: try again later",
}


class TooManyRecords(Exception):
    """The user or tenant has had too many records stored. This one was not stored.

    Attributes:
        retry_after_seconds: when there is room for it again.
    """

    def __init__(self, detail: str, retry_after_seconds: float) -> None:
        super().__init__(detail)
        self.retry_after_seconds = max(1, math.ceil(retry_after_seconds))


class _Author(NamedTuple):
    """Whom a record is from. What one author asks for can go into one record."""

    kind: Kind
    tenant: str
    user: str
    device: str
    partition: int


@dataclass(slots=True)
class _Draft:
    """A record that is not stored yet. It names ids or a position, never both."""

    ids: dict[str, None]
    up_to: int | None
    epoch: str
    stored: asyncio.Future[str]
    requests: int = 0
    trace: str | None = None


@dataclass(slots=True)
class _Line:
    """The drafts of one author, which are stored one after the other."""

    drafts: deque[_Draft] = field(default_factory=deque)

    @property
    def requests(self) -> int:
        """How many requests wait for these drafts to be stored."""
        return sum(draft.requests for draft in self.drafts)

    def draft(self, ids: Sequence[str], up_to: int | None, epoch: str) -> _Draft:
        """Add this to the last draft if it has the same form and room for it, else to a new one; the draft."""
        last = self.drafts[-1] if self.drafts else None
        if last is not None and (last.up_to is None) == (up_to is None) and last.epoch == epoch:
            together = last.ids | dict.fromkeys(ids)
            if len(together) <= READ_IDS:
                last.ids = together
                last.up_to = None if up_to is None else max(up_to, last.up_to or 0)
                return last
        made = _Draft(dict.fromkeys(ids), up_to, epoch, asyncio.get_running_loop().create_future())
        # Whoever asked may have left by the time it fails.
        made.stored.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.drafts.append(made)
        return made

    def give_up(self, begun: _Draft | None = None) -> None:
        """Tell those who wait that nothing is stored any more: neither what was `begun` nor what comes after it."""
        for left in (begun, *self.drafts):
            if left is not None and not left.stored.done():
                left.stored.set_exception(Unavailable("the gateway ends before the record was stored"))


class StateRecords:
    """Stores `read` and `archive` records within the allowances of user and tenant.

    Args:
        broker: where logs are.
        allowances: how much may be stored.
    """

    def __init__(self, broker: Broker, allowances: Allowances) -> None:
        self._broker = broker
        self._allowances = allowances
        self._lines: dict[_Author, _Line] = {}
        self._tasks = Tasks()

    async def append(
        self,
        kind: Kind,
        *,
        tenant: str,
        user: str,
        device: str,
        partition: int,
        epoch: str,
        ids: Sequence[str] = (),
        up_to: int | None = None,
        trace: str | None = None,
    ) -> str:
        """Store that these ids, or everything up to a sequence, are read (or archived).

        Args:
            epoch: the incarnation of the log that `up_to` counts in; empty where it is not known, then by ids only.
            trace: `traceparent` of what asks. A record that several ask for belongs to the first one's trace.

        Returns:
            the id of the stored record. Requests that went into one record all get the same id.

        Raises:
            TooManyRecords: the allowance is used up, or too many requests of this device wait.
            OtherIncarnation: the log was made anew, and `up_to` means nothing in it. Nothing was stored.
            BrokerError: it was not stored, or nobody knows whether it was.
        """
        author = _Author(kind, tenant, user, device, partition)
        line = self._lines.get(author)
        if line is None:
            line = self._lines[author] = _Line()
            self._tasks.begin(self._write(author, line), "state-records")
        elif line.requests >= STATE_REQUESTS_WAITING:
            metrics.gateway_state_records.labels("refused_waiting").inc()
            raise TooManyRecords("too many requests of this device wait for the log: try again in a while", 1.0)
        draft = line.draft(ids, up_to, epoch)
        draft.requests += 1
        draft.trace = draft.trace or trace
        return await asyncio.shield(draft.stored)

    async def close(self) -> None:
        """Give up what is not stored yet, and tell everybody who waits for it."""
        await self._tasks.end()
        for line in self._lines.values():  # of tasks that were cancelled before their first turn
            line.give_up()
        self._lines.clear()

    async def _write(self, author: _Author, line: _Line) -> None:
        draft: _Draft | None = None
        try:
            while line.drafts:
                draft = line.drafts.popleft()
                await self._settle(author, draft)
                await asyncio.sleep(STATE_PAUSE_SECONDS)  # requests that come meanwhile are gathered
        finally:
            self._lines.pop(author, None)
            line.give_up(draft)

    async def _settle(self, author: _Author, draft: _Draft) -> None:
        try:
            draft.stored.set_result(await self._store(author, draft))
        except Exception as error:  # whatever it is, those who asked are told, and the line goes on
            draft.stored.set_exception(error)

    async def _store(self, author: _Author, draft: _Draft) -> str:
        kind, tenant, user, device, partition = author
        id, record = state_record(
            kind, tenant=tenant, user=user, device=device, ids=list(draft.ids), up_to=draft.up_to, trace=draft.trace
        )
        epoch = {EPOCH_HEADER: draft.epoch} if draft.epoch else {}
        trace = {"traceparent": draft.trace} if draft.trace else {}
        subject = log_subject(partition, tenant, user)
        size = len(record) + len(subject) + STORED_OVERHEAD_BYTES
        refusal = await self._allowances.take(tenant, user, partition, size)
        if refusal is not None:
            raise TooManyRecords(_WHY[refusal.whose], refusal.wait_seconds)
        try:
            await self._broker.append(
                subject,
                record,
                {**trace, **epoch} or None,
                msg_id=id,
                epoch=None if draft.up_to is None else draft.epoch,
                budget_seconds=STATE_BUDGET_SECONDS,
            )
        except BrokerError:
            metrics.gateway_state_records.labels("failed").inc()
            raise
        metrics.gateway_state_records.labels("stored").inc()
        return id
