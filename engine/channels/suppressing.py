"""What follows for an address from an outcome: of an attempt, or of what a provider has reported later. Each counts once.

Workers and gateways call this as often as they like: what was acted on is known by its id, and a soft bounce by its message. So
what an operator has lifted is not suppressed again because something was told twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from engine.channels.bounces import SOFT_WINDOW, may_suppress, suppression_of
from engine.channels.channel import Outcome
from engine.directory.changing import CHANGE_SECONDS, Directory
from engine.directory.contacts import Addressed, address_hash
from engine.directory.suppressing import changing_suppressions
from engine.directory.suppressions import lift_opt_outs, put_suppressions
from engine.postgres import Connection

REPORTS_KEPT: Final = timedelta(days=14)
"""Services repeat a request for a day at most (SendGrid 24 h, others less); whoever replays one by hand does it soon."""

PURGED_AT_ONCE: Final = 100
"""Rows that are too old are deleted by those who write new ones, so many at a time."""

_FIRST: Final = "INSERT INTO provider_reports (id) VALUES ($1) ON CONFLICT DO NOTHING RETURNING id"
_PURGE_REPORTS: Final = """
DELETE FROM provider_reports WHERE id IN (
    SELECT id FROM provider_reports WHERE at < now() - $1::interval ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED)
"""
_SOFT: Final = """
INSERT INTO soft_bounces (tenant, address_hash, message, at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING RETURNING at
"""
_SOFT_BEFORE: Final = "SELECT at FROM soft_bounces WHERE tenant = $1 AND address_hash = $2 AND message <> $3"
_PURGE_SOFT: Final = """
DELETE FROM soft_bounces WHERE (tenant, address_hash, message) IN (
    SELECT tenant, address_hash, message FROM soft_bounces WHERE at < now() - $1::interval ORDER BY at LIMIT $2
    FOR UPDATE SKIP LOCKED)
"""
_NOTE_STOP_OR_START: Final = """
INSERT INTO text_wishes AS there (tenant, address_hash, said_at) VALUES ($1, $2, $3)
ON CONFLICT (tenant, address_hash) DO UPDATE SET said_at = excluded.said_at
WHERE there.said_at < excluded.said_at OR there.said_at = excluded.said_at AND $4 RETURNING said_at
"""
_PURGE_STOPS_AND_STARTS: Final = """
DELETE FROM text_wishes WHERE (tenant, address_hash) IN (
    SELECT tenant, address_hash FROM text_wishes WHERE said_at < now() - $1::interval ORDER BY said_at LIMIT $2
    FOR UPDATE SKIP LOCKED)
"""


async def suppress_for(
    directory: Directory,
    tenant: str,
    channel: Addressed,
    address: str,
    outcome: Outcome,
    *,
    category: str,
    message: str,
    at: datetime,
    report: str,
    seconds: float = CHANGE_SECONDS,
) -> bool:
    """Suppress an address where that follows from an outcome; whether it does. What is suppressed for longer already stays so.

    Args:
        category: of the notification.
        message: key of its job.
        at: when the outcome came. Of a wish to get no more texts, when it was sent: if the number has asked for texts since then,
            nothing follows.
        report: the id of what says so: of a provider's report, or the key of a job's claim.

    Raises:
        StoreUnavailable: no answer in time; the outcome may be unknown.
        ValueError: `address` is none. Nothing was changed.
    """
    if not may_suppress(outcome):
        return False
    async with changing_suppressions(directory, tenant, [(channel, address)], seconds) as connection:
        if not await _is_first(connection, tenant, report):
            return False
        wish = channel == "sms" and outcome.kind == "opted_out"
        if wish and not await _noted_as_last(connection, tenant, address, at, stop=True):
            return False
        before: Sequence[datetime] = ()
        if outcome.soft_bounce:
            counted = await _soft_bounces(connection, tenant, channel, address, message, at)
            if counted is None:
                return False
            before = counted
        new = suppression_of(outcome, channel, address, category=category, soft_bounces=before, now=at)
        if new is not None:
            await put_suppressions(connection, tenant, [new], reported=True, said_at=at if wish else None)
        return new is not None


async def free_number(
    directory: Directory,
    tenant: str,
    number: str,
    *,
    at: datetime,
    report: str,
    seconds: float = CHANGE_SECONDS,
) -> bool:
    """Lift the legal opt-outs of a phone number, as its owner has asked for texts again; whether there was one.

    Of STOP and START that one holds which was sent last, in whatever order they come here; of two at one moment STOP.

    Args:
        at: when he asked. What was wished since then stays.
        report: the id of his message.

    Raises:
        StoreUnavailable: no answer in time; the outcome may be unknown.
    """
    async with changing_suppressions(directory, tenant, [("sms", number)], seconds) as connection:
        if not await _is_first(connection, tenant, report):
            return False
        if not await _noted_as_last(connection, tenant, number, at, stop=False):
            return False
        return await lift_opt_outs(connection, tenant, "sms", number, at) > 0


async def acted_on(connection: Connection, reports: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of these reports, each with its tenant, that need not be looked at again."""
    named = {_name(*one): one for one in reports}
    rows = await connection.fetch("SELECT id FROM provider_reports WHERE id = ANY($1)", list(named))
    return {named[row["id"]] for row in rows}


def _name(tenant: str, report: str) -> bytes:
    return hashlib.sha256(f"{tenant}\n{report}".encode("utf-8", "replace")).digest()


async def _is_first(connection: Connection, tenant: str, report: str) -> bool:
    """Whether this report was not acted on before; afterwards it was, if the transaction commits."""
    await connection.execute(_PURGE_REPORTS, REPORTS_KEPT, PURGED_AT_ONCE)
    return await connection.fetchval(_FIRST, _name(tenant, report)) is not None


async def _noted_as_last(connection: Connection, tenant: str, number: str, at: datetime, *, stop: bool) -> bool:
    """Note a STOP or START of a number, if it has said nothing later; whether it was noted. Of two at one moment STOP is.

    Whoever notes another one of the number waits for this transaction.
    """
    await connection.execute(_PURGE_STOPS_AND_STARTS, REPORTS_KEPT, PURGED_AT_ONCE)
    return await connection.fetchval(_NOTE_STOP_OR_START, tenant, address_hash("sms", number), at, stop) is not None


async def _soft_bounces(
    connection: Connection, tenant: str, channel: Addressed, address: str, message: str, at: datetime
) -> list[datetime] | None:
    """Count a soft bounce; when the others of this address were. None: this message was counted before."""
    hash, named = address_hash(channel, address), hashlib.sha256(message.encode("utf-8", "replace")).digest()
    await connection.execute(_PURGE_SOFT, SOFT_WINDOW, PURGED_AT_ONCE)
    if await connection.fetchval(_SOFT, tenant, hash, named, at) is None:
        return None
    return [row["at"] for row in await connection.fetch(_SOFT_BEFORE, tenant, hash, named)]
