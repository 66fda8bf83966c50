"""`DELETE /v1/transactions/{id}`: nothing of a transaction goes out any more; what has gone out is taken off, where asked for.

The order of the steps is the promise. First the cancel is stored. Then a moment passes in which all dispatchers hear of it. Only
then are the ends of the logs read: what lies beyond them is withheld, and what lies before them is in the inbox as soon as
that has passed them.
"""

from __future__ import annotations

import asyncio
import time
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Final

import msgspec

from engine.broker.jetstream import Broker
from engine.broker.refusals import is_full
from engine.cancels import cancel
from engine.errors import ApiError, BrokerError, StoreUnavailable, Unanswered
from engine.limits import CANCEL_SETTLE_SECONDS
from gateway.access.principals import Scope, Service
from gateway.access.shares import Shares
from gateway.api.positions import log_state
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_QUERY, UNAVAILABLE, Kind, Problem
from gateway.limits import (
    CANCEL_REQUESTS,
    CANCEL_REQUESTS_PER_TENANT,
    CANCELS_PER_TENANT,
    INBOX_PASSES_SECONDS,
    READ_IDS,
    RECALL_APPENDS,
    RECALL_ROWS,
    RECALL_SECONDS,
    STATE_BUDGET_SECONDS,
)
from gateway.log.partition import Partition
from projections.inbox.transactions import Fates, Transactions
from projections.store import Checkpoint
from seamark.protocol.errors import InvalidToken
from seamark.protocol.records import EPOCH_HEADER, state_record
from seamark.protocol.subjects import encode_token, log_subject

TOO_MANY_CANCELS: Final = Kind(429, "too_many_cancels")
CANCELS_FULL: Final = Kind(503, "cancels_full")
NOT_RECALLED: Final = Kind(503, "not_recalled")

_LOOK_SECONDS: Final = 0.1


class CancelQuery(msgspec.Struct, frozen=True):
    """`id`: of the transaction. `recall`: take off, too, what devices have been sent already."""

    id: Annotated[str, msgspec.Meta(min_length=1)]
    recall: bool = False


class Cancelled(msgspec.Struct):
    """What has become of the transaction's notifications so far; null where the inbox cannot be asked, or is behind.

    Attributes:
        cancelled: stored for nobody to see.
        recalled: taken off before their users had read them.
        too_late: sent before, and not recalled; with `recall` those that had been read when they were taken off.
        more: there are more to recall: send the request again.
    """

    id: str
    cancelled: int | None
    recalled: int | None
    too_late: int | None
    more: bool = False


@Endpoint(
    "DELETE",
    "/v1/transactions/{id}",
    scope=Scope.EVENTS_WRITE,
    places=Shares(CANCEL_REQUESTS, CANCEL_REQUESTS_PER_TENANT),
    refuses=(INVALID_QUERY, TOO_MANY_CANCELS, CANCELS_FULL, NOT_RECALLED, UNAVAILABLE),
)
async def cancel_transaction(call: Call[Service, CancelQuery, None]) -> Cancelled:
    """Cancel a transaction: what is not dispatched yet, or published later with its id, is shown to nobody.

    It holds after a second and for 31 days. With `recall`, notifications that devices have been sent are taken off again. Sent
    again, the request does what is left to do, and counts anew.
    """
    context, tenant, query = call.context, call.principal.tenant, call.query
    await store_cancel(context, tenant, query.id)
    await asyncio.sleep(CANCEL_SETTLE_SECONDS)
    try:
        transactions = await _folded(context)
        before = await transactions.fates(tenant, query.id)
        if not query.recall:
            return Cancelled(query.id, before.cancelled, before.recalled, before.seen + before.open)
        # Seen ones are taken off as well, and counted as what they are.
        whole = await _Recall(context, transactions, tenant, query.id).run()
        return _recalled(query.id, before, whole=whole)
    except (StoreUnavailable, _Behind, BrokerError) as error:
        if query.recall:
            said = "cancelled, but not all of it recalled yet: send the request again"
            raise Problem(NOT_RECALLED, said, retry_after_seconds=5) from error
        return Cancelled(query.id, None, None, None)


def _recalled(id: str, before: Fates, *, whole: bool) -> Cancelled:
    if whole:
        return Cancelled(id, before.cancelled, before.recalled + before.open, before.seen)
    return Cancelled(id, before.cancelled, before.recalled, before.seen, more=True)


async def store_cancel(context: Context, tenant: str, id: str) -> None:
    """Store that a transaction is cancelled. It holds after a second.

    Raises:
        Problem: it is not, or that is not known: with INVALID_QUERY, TOO_MANY_CANCELS, CANCELS_FULL or UNAVAILABLE.
    """
    try:
        token, _ = encode_token(tenant), encode_token(id)
    except InvalidToken as error:
        raise Problem(INVALID_QUERY, f"`id`: {error}", field="id") from error
    if not context.cancel_rate.take(tenant):
        wait = max(1, round(context.cancel_rate.wait_seconds(tenant)))
        raise Problem(TOO_MANY_CANCELS, "this tenant cancels too much: wait", retry_after_seconds=wait)
    cancels = context.cancels
    if cancels is not None and cancels.of_tenant(token) >= CANCELS_PER_TENANT and not cancels.holds(token, id):
        said = f"{CANCELS_PER_TENANT} transactions of this tenant are cancelled already, each for 31 days: name larger ones"
        raise Problem(TOO_MANY_CANCELS, said, retry_after_seconds=3600)
    try:
        await cancel(context.broker, tenant, id, budget_seconds=STATE_BUDGET_SECONDS)
    except ApiError as error:
        if is_full(error):
            raise Problem(
                CANCELS_FULL, "no more cancelled transactions can be kept", retry_after_seconds=3600
            ) from error
        raise Problem(UNAVAILABLE, "nothing was cancelled: try again") from error
    except Unanswered as error:
        raise Problem(UNAVAILABLE, "whether it is cancelled is not known: try again") from error
    except BrokerError as error:
        raise Problem(UNAVAILABLE, "nothing was cancelled: try again") from error


class _Behind(Exception):
    """The inbox has not passed the ends of the logs in time."""


async def _folded(context: Context) -> Transactions:
    """The inbox, once it holds everything that was dispatched before this call.

    Raises:
        _Behind, StoreUnavailable, BrokerError: it does not, or there is none.
    """
    if context.tables is None:
        raise _Behind
    transactions = context.tables.transactions
    try:
        found = await asyncio.gather(*(_head(context.broker, partition) for partition in context.partitions))
    except Problem as error:
        raise _Behind from error
    heads = {partition.number: head for partition, head in zip(context.partitions, found, strict=True)}
    deadline = time.monotonic() + INBOX_PASSES_SECONDS
    while not await transactions.has_passed(heads):
        if time.monotonic() > deadline:
            raise _Behind
        await asyncio.sleep(_LOOK_SECONDS)
    return transactions


async def _head(broker: Broker, partition: Partition) -> Checkpoint:
    """The newest record by the leader, and not the end of the stream: marks lie behind it, which no projection reads."""
    state = await log_state(partition)
    newest = await broker.leader_last(partition.stream, f"log.{partition.number}.>")
    return Checkpoint(state.epoch, 0 if newest is None else newest.seq)


class _Recall:
    """Appends `recall` records for what a transaction has sent."""

    def __init__(self, context: Context, transactions: Transactions, tenant: str, id: str) -> None:
        self._context = context
        self._transactions = transactions
        self._tenant = tenant
        self._id = id
        self._appending = asyncio.Semaphore(RECALL_APPENDS)

    async def run(self) -> bool:
        """Recall for as long as there is time; whether all is recalled.

        Raises:
            StoreUnavailable, BrokerError: some may be.
        """
        deadline, after = time.monotonic() + RECALL_SECONDS, ("", "")
        while time.monotonic() < deadline:
            rows = await self._transactions.recallable(self._tenant, self._id, after, RECALL_ROWS)
            await self._recall(rows)
            if len(rows) < RECALL_ROWS:
                return True
            after = rows[-1]
        return False

    async def _recall(self, rows: list[tuple[str, str]]) -> None:
        users = [(user, [id for _, id in found]) for user, found in groupby(rows, key=itemgetter(0))]
        parts = [(user, ids[n : n + READ_IDS]) for user, ids in users for n in range(0, len(ids), READ_IDS)]
        done = await asyncio.gather(*(self._append(user, ids) for user, ids in parts), return_exceptions=True)
        for failure in done:
            if isinstance(failure, BaseException):
                raise failure

    async def _append(self, user: str, ids: list[str]) -> None:
        partition = self._context.partition(self._tenant, user)
        id, record = state_record("recall", tenant=self._tenant, user=user, device=None, ids=ids)
        known = partition.watch.last
        headers = {EPOCH_HEADER: known.epoch} if known is not None else None
        subject, broker = log_subject(partition.number, self._tenant, user), self._context.broker
        async with self._appending:
            await broker.append(subject, record, headers, msg_id=id, budget_seconds=STATE_BUDGET_SECONDS)
