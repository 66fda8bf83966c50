"""What services and operators do with campaigns: ask for one, look at it, hold it up, end it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from engine.campaigns.draft import Audience, Draft, Message
from engine.campaigns.members import Question
from engine.campaigns.progress import FAILED_PAGE, PROGRESS, Progress, progress_of
from engine.campaigns.states import CampaignState
from engine.postgres import LOOK_SECONDS, Pool, asking, transaction
from seamark.protocol.errors import SeamarkError

UNFINISHED_MAX: Final = 1000
"""Campaigns of a tenant that are not finished: each is looked at four times a second."""

KEPT_DAYS: Final = 90
"""How long a finished campaign and its pages are kept: as long as deliveries are by default."""

LIST_MAX: Final = 250


class CampaignConflict(SeamarkError):
    """The campaign is not in a state in which that can be done. The message says which, and the remedy."""


class NoCampaign(SeamarkError):
    """There is no campaign of that name."""


class TooManyCampaigns(SeamarkError):
    """The tenant has as many unfinished campaigns as it may."""


class Size(msgspec.Struct, frozen=True):
    """How large an audience is now: all of it, and how many of them are excluded."""

    audience: int
    excluded: int

    @property
    def recipients(self) -> int:
        """How many would get it."""
        return self.audience - self.excluded


class Campaigns:
    """The campaigns of all tenants. Every method raises StoreUnavailable where there is no answer."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(self, tenant: str, draft: Draft) -> bool:
        """Store a campaign, which begins at once or at its time; False: this very campaign is stored already.

        Raises:
            InvalidCampaign: with the member and the remedy. TooManyCampaigns: others are not finished.
            CampaignConflict: another campaign has this id.
        """
        draft.check(tenant)
        fingerprint = hashlib.sha256(msgspec.json.encode(draft)).digest()
        async with transaction(self._pool) as connection:
            stored = await connection.fetchval(
                _CREATE,
                tenant,
                draft.id,
                fingerprint,
                msgspec.json.encode(draft.message).decode(),
                _without_users(draft.audience),
                _without_users(draft.exclude),
                _sorted_users(draft.audience),
                _sorted_users(draft.exclude),
                draft.rate,
                draft.start_at,
                draft.not_after,
                UNFINISHED_MAX,
                draft.message.expires_at,
            )
            if stored:
                return True
            known = await connection.fetchval(
                "SELECT fingerprint FROM campaigns WHERE tenant = $1 AND id = $2", tenant, draft.id
            )
            if known is None:
                draft.check_time(await connection.fetchval("SELECT now()"))
        if known is None:
            raise TooManyCampaigns(f"{UNFINISHED_MAX} campaigns are not finished: cancel some, or wait for them")
        if known != fingerprint:
            raise CampaignConflict("another campaign has this `id`: choose another one")
        return False

    async def read(self, tenant: str, id: str) -> Draft:
        """A campaign as it was asked for, with its present rate.

        Raises:
            NoCampaign.
        """
        async with asking(self._pool) as connection:
            row = await connection.fetchrow(_READ, tenant, id)
        if row is None:
            raise NoCampaign(f"there is no campaign {id!r}")
        return Draft(
            id=id,
            audience=_with_users(row["audience"], row["users"]),
            message=msgspec.json.decode(row["message"], type=Message),
            exclude=None if row["exclude"] is None else _with_users(row["exclude"], row["exclude_users"]),
            rate=row["rate"],
            start_at=row["start_at"],
            not_after=row["not_after"],
        )

    async def progress(self, tenant: str, id: str) -> Progress:
        """How far a campaign has come, as of one moment.

        Raises:
            NoCampaign.
        """
        async with asking(self._pool) as connection:
            row = await connection.fetchrow(f"{PROGRESS} AND c.id = $2", tenant, id)
        if row is None:
            raise NoCampaign(f"there is no campaign {id!r}")
        return progress_of(dict(row))

    async def list(self, tenant: str, limit: int, after: tuple[datetime, str] | None = None) -> list[Progress]:
        """Campaigns, the newest first.

        Args:
            after: when the last one of the page before was created, and its id.
        """
        at, id = after or (None, None)
        statement = f"""{PROGRESS} AND ($2::timestamptz IS NULL OR (c.created_at, c.id) < ($2, $3::text))
            ORDER BY c.created_at DESC, c.id DESC LIMIT $4"""
        async with asking(self._pool) as connection:
            rows = await connection.fetch(statement, tenant, at, id, min(limit, LIST_MAX))
        return [progress_of(dict(row)) for row in rows]

    async def pause(self, tenant: str, id: str) -> None:
        """Begin no page any more, until it is resumed. Raises NoCampaign, CampaignConflict."""
        await self._change(tenant, id, CampaignState.PAUSED, "state = 'paused'")

    async def resume(self, tenant: str, id: str) -> None:
        """Go on. Raises NoCampaign, CampaignConflict."""
        await self._change(tenant, id, CampaignState.RUNNING, "state = 'running'")

    async def set_rate(self, tenant: str, id: str, rate: int | None) -> None:
        """Go on at another rate, from the next page on. Raises NoCampaign, CampaignConflict."""
        # What a slower rate made the next page wait for is not waited for any more.
        change = """rate = $4, publish_at = CASE WHEN rate IS NOT DISTINCT FROM $4 THEN publish_at
                                ELSE least(publish_at, greatest(start_at, now())) END"""
        await self._change(tenant, id, None, change, rate)

    async def cancel(self, tenant: str, id: str) -> None:
        """Begin no page ever again. Raises NoCampaign, CampaignConflict."""
        await self._change(tenant, id, CampaignState.CANCELLED, "state = 'cancelled'")

    async def _change(self, tenant: str, id: str, target: CampaignState | None, change: str, *args: Any) -> None:
        """Make a change of a campaign that is not over; none where it is in the target state already."""
        async with transaction(self._pool) as connection:
            found = await connection.fetchrow(
                "SELECT state, finished_at FROM campaigns WHERE tenant = $1 AND id = $2 FOR UPDATE", tenant, id
            )
            if found is None:
                raise NoCampaign(f"there is no campaign {id!r}")
            if found["state"] == target:
                return
            # One that has expired may have pages in BULK, which can still be withheld.
            changeable = (
                ("running", "paused", "expired") if target is CampaignState.CANCELLED else ("running", "paused")
            )
            if found["finished_at"] is not None or found["state"] not in changeable:
                has_failed = found["state"] == "expired" and await connection.fetchval(_HAS_FAILED, tenant, id)
                state = CampaignState.FAILED if has_failed else found["state"]
                raise CampaignConflict(f"the campaign is {state}: nothing more can be changed")
            await connection.execute(
                f"UPDATE campaigns SET {change}, revision = revision + 1, changed_at = now()"
                " WHERE tenant = $1 AND id = $2 AND $3::text IS NOT DISTINCT FROM $3",
                tenant,
                id,
                target,
                *args,
            )
            if target is CampaignState.CANCELLED:
                await connection.execute(_CANCEL_PAGES, tenant, id)

    async def size(self, tenant: str, draft: Draft) -> Size:
        """How large the audience of a campaign would be now; nothing is stored.

        Raises:
            InvalidCampaign: it could not be created. StoreUnavailable: also where counting takes longer than 30 s.
        """
        draft.check(tenant)
        question = Question(draft.audience, draft.exclude, named=True)
        lists = _sorted_users(draft.audience), _sorted_users(draft.exclude)
        async with transaction(self._pool, LOOK_SECONDS) as connection:
            draft.check_time(await connection.fetchval("SELECT now()"))
            row = await connection.fetchrow(question.counting, tenant, *lists, None, *question.args)
        assert row is not None
        return Size(row["audience"], row["excluded"])

    async def sample(self, tenant: str, draft: Draft, most: int) -> Sequence[str]:
        """Recipients that a campaign would have now, drawn at random; all of them where they are no more than `most`.

        Raises: as `size`.
        """
        question = Question(draft.audience, draft.exclude, named=True)
        lists = _sorted_users(draft.audience), _sorted_users(draft.exclude)
        async with asking(self._pool, LOOK_SECONDS) as connection:
            rows = await connection.fetch(question.sample(most), tenant, *lists, None, *question.args)
        return [row["user_id"] for row in rows]

    async def remove_old(self, days: int = KEPT_DAYS) -> int:
        """Remove campaigns that were finished so many days ago, some at a time; how many."""
        async with asking(self._pool, LOOK_SECONDS) as connection:
            return len(await connection.fetch(_REMOVE, days))


def _without_users(audience: Audience | None) -> str | None:
    if audience is None:
        return None
    kept = msgspec.structs.replace(audience, users=()) if audience.users is not None else audience
    return msgspec.json.encode(kept).decode()


def _with_users(said: str, users: list[str] | None) -> Audience:
    audience = msgspec.json.decode(said, type=Audience)
    return audience if users is None else msgspec.structs.replace(audience, users=tuple(users))


def _sorted_users(audience: Audience | None) -> list[str] | None:
    return None if audience is None or audience.users is None else sorted(set(audience.users))


_CREATE: Final = """
    INSERT INTO campaigns (tenant, id, fingerprint, message, audience, exclude, users, exclude_users, rate,
                           start_at, publish_at, not_after)
    SELECT $1::text, $2, $3, $4, $5::jsonb, $6::jsonb, $7, $8, $9,
           coalesce($10, now()), coalesce($10, now()), $11
    WHERE (SELECT count(*) FROM campaigns WHERE tenant = $1 AND finished_at IS NULL) < $12
      AND coalesce(least($11::timestamptz, $13::timestamptz) > now(), true)
    ON CONFLICT DO NOTHING RETURNING true
"""

_READ: Final = """
    SELECT message, audience, exclude, users, exclude_users, rate, start_at, not_after
    FROM campaigns WHERE tenant = $1 AND id = $2
"""

_HAS_FAILED: Final = f"SELECT EXISTS (SELECT FROM campaign_pages WHERE tenant = $1 AND campaign = $2 AND {FAILED_PAGE})"

_CANCEL_PAGES: Final = """
    UPDATE campaign_pages SET state = 'cancelled', finished_at = now()
    WHERE tenant = $1 AND campaign = $2 AND state = 'fixed'
"""

_REMOVE: Final = """
    DELETE FROM campaigns WHERE (tenant, id) IN (
        SELECT tenant, id FROM campaigns WHERE finished_at < now() - make_interval(days => $1) LIMIT 100
    ) RETURNING id
"""
