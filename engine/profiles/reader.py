"""A profile as the primary has it: what several tables say of a user, without an address."""

from __future__ import annotations

from typing import Final

from engine.directory.contacts import Addressed
from engine.directory.suppressions import of_addresses
from engine.plan.preferences import Preferences
from engine.plan.profile import Profile
from engine.plan.rules import Channel
from engine.postgres import Pool, asking
from engine.profiles.preferences import preferences_of

READ_SECONDS: Final = 5.0

_READ: Final = """
SELECT p.version, p.deleted_at IS NOT NULL AS deleted, u.email, u.phone, u.locale, u.timezone, f.document::text AS document,
    EXISTS (SELECT FROM push_tokens WHERE tenant = $1 AND user_id = $2 AND retired_at IS NULL) AS push,
    EXISTS (SELECT FROM webhook_endpoints WHERE tenant = $1 AND user_id = $2 AND state = 'active') AS webhook
FROM (VALUES ($1::text, $2::text)) AS asked (tenant, user_id)
    LEFT JOIN profiles p USING (tenant, user_id)
    LEFT JOIN users u USING (tenant, user_id)
    LEFT JOIN preferences f USING (tenant, user_id)
"""


async def read_profile(pool: Pool, tenant: str, user: str) -> Profile:
    """The profile of a user; of one who is in no table the empty one.

    The statements need not see one moment: who changes any of it marks the profile first, so what was read is then not kept.

    Raises:
        StoreUnavailable: no answer in time.
    """
    async with asking(pool, READ_SECONDS) as connection:
        row = await connection.fetchrow(_READ, tenant, user)
        assert row is not None, "a row of VALUES is always there"
        if row["deleted"]:
            return Profile(version=row["version"], deleted=True)
        said: tuple[tuple[Addressed, str | None], ...] = ("email", row["email"]), ("sms", row["phone"])
        addresses = {channel: address for channel, address in said if address is not None}
        suppressions = await of_addresses(connection, tenant, addresses) if addresses else ()
    reach: list[Channel] = ["inapp", *addresses]
    reach += [channel for channel in ("push", "webhook") if row[channel]]
    return Profile(
        version=row["version"] or 0,
        locale=row["locale"],
        timezone=row["timezone"],
        preferences=Preferences() if row["document"] is None else preferences_of(row["document"]),
        reach=tuple(reach),
        suppressions=suppressions,
    )
