"""Endpoints as a worker uses them: which get a notification, how one is signed for, and what is noted of how it fared.

What is noted is no rule, and changes with every failure, so it is written beside the rules without counting as a change of them.
That an endpoint is disabled does change the rules: it is a second step, which whoever finds it undone does again.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec

from engine.channels.channel import Outcome
from engine.channels.webhook.channel import Endpoint
from engine.channels.webhook.health import Health, enabled, reported
from engine.directory.changes import Change
from engine.directory.sealing import PLAIN, Seal
from engine.plan.patterns import patterns_of
from engine.postgres import Connection

OK_NOTED_EVERY: Final = timedelta(minutes=1)
"""A success is written down when there was a failure before it, else so often: not each webhook is to cost a write. So a failure
that is reported late may count although a success came after it, if that was less than a minute later."""

# Both ask for `health`, too: between the two steps the state still says active.
_TARGETS: Final = """
SELECT id FROM webhook_endpoints WHERE tenant = $1 AND (user_id IS NULL OR user_id = $2) AND types && $3
    AND state = 'active' AND health->>'disabled' IS NULL ORDER BY id
"""

_ENDPOINT: Final = """
SELECT url, secret, previous_secret FROM webhook_endpoints WHERE tenant = $1 AND id = $2
    AND state = 'active' AND health->>'disabled' IS NULL
"""

_HELD: Final = """
SELECT health::text AS health, changed_at FROM webhook_endpoints WHERE tenant = $1 AND id = $2 AND state = 'active' FOR UPDATE
"""

_NOTE: Final = "UPDATE webhook_endpoints SET health = $3::text::jsonb WHERE tenant = $1 AND id = $2"

_DISABLE: Final = """
UPDATE webhook_endpoints SET state = 'disabled', version = version + 1, changed_at = now()
WHERE tenant = $1 AND id = $2 AND state = 'active' AND health->>'disabled' IS NOT NULL RETURNING user_id
"""


async def targets_of(connection: Connection, tenant: str, user: str, type: str) -> list[str]:
    """The ids of the endpoints that get notifications of this type for this user: the tenant's, and the user's own."""
    rows = await connection.fetch(_TARGETS, tenant, user, list(patterns_of(type)))
    return [row["id"] for row in rows]


async def endpoint_of(connection: Connection, tenant: str, id: str, seal: Seal = PLAIN) -> Endpoint | None:
    """The endpoint of this id, with its secrets; None: it is gone, or disabled.

    Raises:
        StoreBroken: `seal` does not open them.
    """
    row = await connection.fetchrow(_ENDPOINT, tenant, id)
    if row is None:
        return None
    secrets = [seal.open(one, tenant, id) for one in (row["secret"], row["previous_secret"]) if one]
    return Endpoint(id, row["url"], tuple(secrets))


async def note_attempt(
    connection: Connection, tenant: str, id: str, outcome: Outcome, message: str, sent_at: datetime
) -> Health | None:
    """Note how an attempt ended; what is known of the endpoint then. None: it is gone, or was disabled.

    Where the answer says `disabled`, the caller has `disable` follow, in another transaction: this one holds nothing but the row.

    Args:
        connection: in a transaction.
        outcome: of the attempt.
        message: its `webhook-id`.
        sent_at: when it began.
    """
    row = await connection.fetchrow(_HELD, tenant, id)
    if row is None:
        return None
    before = enabled(row["changed_at"]) if row["health"] is None else msgspec.json.decode(row["health"], type=Health)
    after = reported(before, outcome, message, sent_at)
    if _is_worth_noting(before, after):
        await connection.execute(_NOTE, tenant, id, msgspec.json.encode(after).decode())
    return after


async def disable(change: Change, id: str) -> bool:
    """Take an endpoint out of the rules that note_attempt has found to be disabled; whether there was anything to do.

    Of a user's endpoint, the caller holds the user's profile, and touches it; afterwards the bell is rung, if `change.made`.
    """
    row = await change.connection.fetchrow(_DISABLE, change.tenant, id)
    if row is None:
        return False
    change.made |= row["user_id"] is None
    return True


def _is_worth_noting(before: Health, after: Health) -> bool:
    if msgspec.structs.replace(before, ok_at=None) != msgspec.structs.replace(after, ok_at=None):
        return True
    return after.ok_at is not None and (before.ok_at is None or after.ok_at - before.ok_at >= OK_NOTED_EVERY)
