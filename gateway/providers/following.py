"""What follows from reports and answers: receipts in RECEIPTS, suppressions in the directory. All of it may be done twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

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
from engine.jobs.claims import ClaimsUnavailable
from engine.jobs.digests import is_digest
from engine.postgres import asking
from engine.traces.contexts import trace_line
from engine.traces.lines import about_followed
from engine.traces.messages import receipts_stored
from engine.traces.spans import active
from gateway import metrics
from gateway.api.directory import directory_of
from gateway.context import Context
from gateway.limits import DIRECTORY_SECONDS, RECEIPT_BATCH
from projections.deliveries.members import members_of
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
    now, spans, since = datetime.now(UTC), active(), time.time_ns()
    receipts, made = list[Outgoing](), list[tuple[Reference, list[Outgoing]]]()
    for report, what in known:
        if report.state == "sent":
            continue  # the worker has said so
        of_one = _receipts(context, provider, report, what, *await _about(context, provider, report, what), now)
        if spans is not None:
            made.append((what, of_one))
        receipts += of_one
        while len(receipts) >= RECEIPT_BATCH:
            await context.broker.commit(receipts[:RECEIPT_BATCH])
            del receipts[:RECEIPT_BATCH]
    if receipts:
        await context.broker.commit(receipts)
    if spans is not None:
        for what, of_one in made:
            receipts_stored(spans, of_one, since, stored_at=what.stored_at * 10**9)
    about = [(report, what) for report, what in known if report.outcome is not None and may_suppress(report.outcome)]
    done: set[tuple[str, str]] = set()
    if about:
        async with asking(directory_of(context).pool, DIRECTORY_SECONDS) as connection:
            done = await acted_on(connection, [(what.tenant, report.id) for report, what in about])
    for report, what in about:
        if (what.tenant, report.id) not in done:
            with about_followed(what.trace):
                await _suppress(context, report, what, now)
    for report, what in known:
        metrics.gateway_reports.labels(provider, report.state).inc()
        if report.outcome is not None:
            with about_followed(what.trace):
                point_out(what.channel, report.outcome)


async def follow_answer(context: Context, provider: str, tenants: Sequence[str], inbound: Inbound) -> None:
    """End texts to a number, or let them begin again, for all tenants that send by this provider.

    Raises:
        StoreUnavailable: that is not stored. The provider posts it again.
    """
    word, now = inbound.keyword, datetime.now(UTC)
    metrics.gateway_reports.labels(provider, word or "answered").inc()
    directory, report = directory_of(context), report_id(provider, "inbound", inbound.provider_id)
    # Providers that give no time post at once, so now is when it was sent.
    at = now if inbound.at is None else min(inbound.at, now)
    for tenant in tenants if word in ("stop", "start") else ():
        try:
            if word == "start":
                await free_number(directory, tenant, inbound.number, at=at, report=report, seconds=DIRECTORY_SECONDS)
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
                    at=at,
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


async def _about(context: Context, provider: str, report: Report, what: Reference) -> tuple[dict[str, str], int]:
    """The notifications that a report is about, with their traces: of a digest its members.

    And how often one of them was tried before by messages that nobody remembers: the worker's receipts count on from there.

    Its claim says them, from before its first try on and for three days; afterwards the receipts of its sending, which are
    folded by then. Where nobody knows them any more, the report is stored of the digest itself.

    Raises:
        StoreUnavailable: PostgreSQL does not answer.
    """
    itself = {what.id: what.trace}, 0
    if not is_digest(what.id):
        return itself
    try:
        claim = (await context.claims.look(what.claim_key)).claim if context.claims is not None else None
    except ClaimsUnavailable:
        claim = None
    if claim is not None:
        members = claim.members
        if members is None:
            return itself
        return {id: members.traces.get(id, "") for id in members.ids}, members.tried
    found = await members_of(
        directory_of(context).pool,
        what.tenant,
        what.user,
        what.channel,
        what.id,
        attempt=what.attempt + 1,
        provider=provider,
        provider_id=report.provider_id,
    )
    return (found, 0) if found else itself


def _receipts(
    context: Context, provider: str, report: Report, what: Reference, about: dict[str, str], tried: int, now: datetime
) -> list[Outgoing]:
    receipt = Receipt(
        user=what.user,
        channel=what.channel,
        state=report.state,
        at=report.at if now - CLOCKS <= report.at <= now else now,
        device=what.target,
        reason=report.outcome.code if report.outcome is not None and report.state == "failed" else None,
        attempt=what.attempt + 1 + tried,  # a receipt counts tries from 1
        provider=provider,
    )
    subject = receipt_subject(context.partition(what.tenant, what.user).number, what.tenant, what.user)
    return [
        Outgoing(subject, _encode(replace(receipt, id=id, trace=trace or None)), trace_line(trace) if trace else b"")
        for id, trace in about.items()
    ]


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
