"""Profiles as the primary has them: what several tables say of a user, without an address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from engine.directory.contacts import Addressed, address_hash
from engine.directory.suppressions import of_users
from engine.patience import passes
from engine.plan.preferences import Preferences
from engine.plan.profile import Profile, Suppression
from engine.plan.rules import Channel
from engine.postgres import Pool, asking, transposed
from engine.profiles.preferences import preferences_of
from engine.questions import Questions

READ_SECONDS: Final = 5.0

USERS_MAX: Final = 128
"""Users of one statement: some milliseconds of PostgreSQL's time."""

UNREADABLE_MAX: Final = 2
"""Profiles of those that are asked for together which cannot be read; if there are more, it is no user's fault."""

_READ: Final = """
SELECT p.version, p.deleted_at IS NOT NULL AS deleted, u.email, u.phone, u.locale, u.timezone, f.document::text AS document,
    EXISTS (
        SELECT FROM push_tokens t WHERE t.tenant = asked.tenant AND t.user_id = asked.user_id AND t.retired_at IS NULL
    ) AS push,
    EXISTS (
        SELECT FROM webhook_endpoints w WHERE w.tenant = asked.tenant AND w.user_id = asked.user_id AND w.state = 'active'
    ) AS webhook
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS asked (tenant, user_id, place)
    LEFT JOIN profiles p USING (tenant, user_id)
    LEFT JOIN users u USING (tenant, user_id)
    LEFT JOIN preferences f USING (tenant, user_id)
ORDER BY place
"""

_ADDRESSES: Final[tuple[tuple[Addressed, str], ...]] = (("email", "email"), ("sms", "phone"))
"""Channels, and the columns of their addresses."""


async def read_profiles(pool: Pool, users: Sequence[tuple[str, str]]) -> list[Profile]:
    """The profiles of users, each by tenant and name; of one who is in no table the empty one.

    The statements need not see one moment: who changes any of it marks the profile first, so what was read is then not kept.

    Raises:
        StoreUnavailable: no answer in time.
    """
    async with asking(pool, READ_SECONDS) as connection:
        rows = await connection.fetch(_READ, *transposed(users))
        addresses = [
            (number, users[number][0], address_hash(channel, row[column]))
            for number, row in enumerate(rows)
            for channel, column in _ADDRESSES
            if row[column] is not None and not row["deleted"]
        ]
        suppressions = await of_users(connection, addresses)
    return [_profile(row, suppressions.get(number, ())) for number, row in enumerate(rows)]


async def read_profile(pool: Pool, tenant: str, user: str) -> Profile:
    """The profile of one user. Raises as `read_profiles`."""
    [profile] = await read_profiles(pool, [(tenant, user)])
    return profile


class SharedReads:
    """Reads the profiles of users that are asked for at the same time together."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._questions: Questions[tuple[str, str], Profile | Exception] = Questions(
            "profiles", self._read, most=USERS_MAX
        )

    async def read(self, tenant: str, user: str) -> Profile:
        """The profile of one user, as it is when this is asked or later. Raises as `read_profiles`, and what is wrong with it."""
        answer = await self._questions.answer((tenant, user))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _read(self, users: Sequence[tuple[str, str]]) -> Sequence[Profile | Exception]:
        try:
            return await read_profiles(self._pool, users)
        except Exception as error:
            if len(users) == 1 or passes(error):
                raise
        # One whose profile cannot be read, as another version has written it, is nobody else's fault.
        answers = list[Profile | Exception]()
        for user in users:
            try:
                answers.append(await read_profile(self._pool, *user))
            except Exception as error:
                if passes(error) or sum(isinstance(one, Exception) for one in answers) >= UNREADABLE_MAX:
                    raise
                answers.append(error)
        return answers

    async def close(self) -> None:
        """Ask nothing more."""
        await self._questions.close()


def _profile(row: Any, suppressions: tuple[Suppression, ...]) -> Profile:
    if row["deleted"]:
        return Profile(version=row["version"], deleted=True)
    reach: list[Channel] = ["inapp", *(channel for channel, column in _ADDRESSES if row[column] is not None)]
    reach += [channel for channel in ("push", "webhook") if row[channel]]
    return Profile(
        version=row["version"] or 0,
        locale=row["locale"],
        timezone=row["timezone"],
        preferences=Preferences() if row["document"] is None else preferences_of(row["document"]),
        reach=tuple(reach),
        suppressions=suppressions,
    )
