"""What follows from reports and answers: receipts in RECEIPTS, suppressions in the directory. All of it may be done twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
import structlog

from engine.broker.jetstream import Outgoing
from engine.channels.alarms import point_out
from engine.channels.bounces import may_suppress
from engine.channels.channel import Outcome
from engine.channels.references import Reference, References
from engine.channels.reports import Report, report_id
from engine.channels.sealed import TokenRefused
from engine.channels.sms.callbacks import Inbound
from engine.channels.suppressing import acted_on, free_number, suppress_for
from engine.directory.contacts import Addressed
from engine.postgres import asking
from gateway import metrics
from gateway.api.directory import directory_of
from gateway.context import Context
from gateway.limits import DIRECTORY_SECONDS, RECEIPT_BATCH
from seamark.protocol.receipts import Receipt
from seamark.protocol.subjects import receipt_subject

_log = structlog.get_logger("seamark.callbacks")

CLOCKS: Final = timedelta(days=31)
"""A time that is further off than any report can be late is not believed."""

_DELETED: Final = """
SELECT p.tenant, p.user_id FROM profiles p JOIN unnest($1::text[], $2::text[]) AS asked (tenant, user_id) USING (tenant, user_id)
WHERE p.deleted_at IS NOT NULL
"""

_encode = msgspec.json.Encoder().encode

_Known = tuple[Report, Reference]


async def follow_reports(context: Context, provider: str, channel: str, reports: Sequence[Report]) -> None:
    """Store what reports say of notifications, then what it means for addresses. `provider`: its name, as in receipts.

    Raises:
        BrokerError, StoreUnavailable: not all of it is stored. The provider posts it again.
    """
    known = await _of_living_users(context, _matched(context.references, provider, channel, reports))
    now = datetime.now(UTC)
    receipts = [_receipt(context, provider, *one, now) for one in known if one[0].state != "sent"]
    for begin in range(0, len(receipts), RECEIPT_BATCH):
        await context.broker.commit(receipts[begin : begin + RECEIPT_BATCH])
    about = [(report, what) for report, what in known if report.outcome is not None and may_suppress(report.outcome)]
    done: set[tuple[str, str]] = set()
    if about:
        async with asking(directory_of(context).pool, DIRECTORY_SECONDS) as connection:
            done = await acted_on(connection, [(what.tenant, report.id) for report, what in about])
    for report, what in about:
        if (what.tenant, report.id) not in done:
            await _suppress(context, report, what, now)
    for report, what in known:
        metrics.gateway_reports.labels(provider, report.state).inc()
        if report.outcome is not None:
            point_out(what.channel, report.outcome)


async def follow_answer(context: Context, provider: str, tenants: Sequence[str], inbound: Inbound) -> None:
    """End texts to a number, or let them begin again, for all tenants that send by this provider.

    Raises:
        StoreUnavailable: that is not stored. The provider posts it again.
    """
    word, now = inbound.keyword, datetime.now(UTC)
    metrics.gateway_reports.labels(provider, word or "answered").inc()
    directory, report = directory_of(context), report_id(provider, "inbound", inbound.provider_id)
    for tenant in tenants if word in ("stop", "start") else ():
        try:
            if word == "start":
                await free_number(
                    directory, tenant, inbound.number, before=inbound.at, report=report, seconds=DIRECTORY_SECONDS
                )
            else:
                stop = Outcome(kind="opted_out", provider=provider, code="STOP")
                await suppress_for(
                    directory,
                    tenant,
                    "sms",
                    inbound.number,
                    stop,
                    category="",
                    message=report,
                    at=now,
                    report=report,
                    seconds=DIRECTORY_SECONDS,
                )
        except ValueError:
            _log.warning("answer_of_no_number", provider=provider)  # a short code, or a name: nothing is sent there
            return


def _matched(references: References | None, provider: str, channel: str, reports: Sequence[Report]) -> Iterator[_Known]:
    """Reports with the try that each is about. The others are of mails that somebody else sends by the same account."""
    for report in reports:
        try:
            reference = references.read(report.reference) if references is not None else None
        except TokenRefused:
            reference = None
        if reference is None or reference.channel != channel:
            metrics.gateway_reports.labels(provider, "unmatched").inc()
        else:
            yield report, reference


async def _of_living_users(context: Context, matched: Iterator[_Known]) -> list[_Known]:
    """Without those of users who were deleted: nothing more is stored of them."""
    known = list(matched)
    if not known:
        return []
    whose = sorted({(reference.tenant, reference.user) for _, reference in known})
    async with asking(directory_of(context).pool, DIRECTORY_SECONDS) as connection:
        rows = await connection.fetch(_DELETED, [tenant for tenant, _ in whose], [user for _, user in whose])
    deleted = {tuple(row) for row in rows}
    return [one for one in known if (one[1].tenant, one[1].user) not in deleted]


def _receipt(context: Context, provider: str, report: Report, what: Reference, now: datetime) -> Outgoing:
    receipt = Receipt(
        user=what.user,
        channel=what.channel,
        state=report.state,
        at=report.at if now - CLOCKS <= report.at <= now else now,
        device=what.target,
        id=what.id,
        reason=report.outcome.code if report.outcome is not None and report.state == "failed" else None,
        attempt=what.attempt + 1,  # a receipt counts tries from 1
        provider=provider,
    )
    partition = context.partition(what.tenant, what.user).number
    return Outgoing(receipt_subject(partition, what.tenant, what.user), _encode(receipt))


async def _suppress(context: Context, report: Report, what: Reference, now: datetime) -> None:
    assert report.outcome is not None, "only an outcome can suppress"
    channel: Addressed = "sms" if what.channel == "sms" else "email"
    try:
        await suppress_for(
            directory_of(context),
            what.tenant,
            channel,
            report.address,
            report.outcome,
            category=what.category,
            message=what.key,
            at=now,
            report=report.id,
            seconds=DIRECTORY_SECONDS,
        )
    except ValueError:
        _log.warning("report_of_no_address", provider=report.outcome.provider, channel=channel)
