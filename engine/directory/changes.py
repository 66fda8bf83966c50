"""Changes of a tenant's rules: one transaction at a time, each counted once, and every process told of it.

Rules are what is small and held whole by every process: types, the index of templates, tenant defaults, the tenant's own webhook
endpoints. The count is the `version` of whatever the change wrote, so no version of anything ever comes again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from engine.errors import LimitReached
from engine.limits import RULE_BYTES_MAX, TEMPLATES_MAX, TYPES_MAX
from engine.postgres import Connection, Pool, transaction

CHANGE_SECONDS: Final = 10.0
"""One change; it waits for others of the same tenant within it."""

# Whoever holds the row is alone with the tenant's rules until the end of the transaction: bounds that are checked hold, and
# the version that is counted is the version of all that was written.
_BEGIN: Final = """
INSERT INTO rule_versions (tenant, version) VALUES ($1, 0) ON CONFLICT (tenant) DO UPDATE SET version = rule_versions.version
RETURNING version
"""

_COUNT: Final = "UPDATE rule_versions SET version = $2, changed_at = now() WHERE tenant = $1"

_SIZE: Final = """
SELECT count(*) AS types, coalesce(sum(octet_length(rule::text)), 0)
        + coalesce((SELECT octet_length(document::text) FROM tenant_defaults WHERE tenant = $1), 0) AS bytes,
    (SELECT count(*) FROM templates WHERE tenant = $1 AND active) AS templates
FROM notification_types WHERE tenant = $1
"""


class Change:
    """A transaction that may change a tenant's rules.

    Attributes:
        version: what has been written by it gets this version.
        made: whether it has written anything that processes hold.
    """

    def __init__(self, connection: Connection, tenant: str, before: int) -> None:
        self.connection, self.tenant, self.version = connection, tenant, before + 1
        self.made = False


@asynccontextmanager
async def changing(pool: Pool, tenant: str, seconds: float = CHANGE_SECONDS) -> AsyncIterator[Change]:
    """A transaction for the block, alone with the rules of `tenant`. Afterwards the caller rings the bell, if `made`.

    Raises:
        StoreUnavailable: no answer in time; the outcome may be unknown. LimitReached: the tenant would have too many rules.
    """
    async with transaction(pool, seconds) as connection, changing_in(connection, tenant) as change:
        yield change


@asynccontextmanager
async def changing_in(connection: Connection, tenant: str) -> AsyncIterator[Change]:
    """The same in a transaction of the caller's. One that changes users, too, holds these first, and the rules last."""
    change = Change(connection, tenant, await connection.fetchval(_BEGIN, tenant))
    yield change
    if change.made:
        await _check_size(change)
        await connection.execute(_COUNT, tenant, change.version)


async def _check_size(change: Change) -> None:
    row = await change.connection.fetchrow(_SIZE, change.tenant)
    assert row is not None, "an aggregate has a row"
    for many, most, what in (
        (row["types"], TYPES_MAX, "types"),
        (row["templates"], TEMPLATES_MAX, "active templates"),
        (row["bytes"], RULE_BYTES_MAX, "bytes of types and defaults"),
    ):
        if many > most:
            raise LimitReached(
                f"a tenant may have {most} {what}, not {many}: delete some, or let a pattern stand for many"
            )
