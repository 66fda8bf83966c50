"""Campaigns and their pages in PostgreSQL, as a pager changes them: each change compares first, and is whole or nothing.

Every method raises StoreUnavailable where there is no answer, and then may or may not have done its work: it may be called again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import msgspec

from engine.campaigns.cuts import Cut, Member, Window
from engine.campaigns.draft import Audience, Message
from engine.campaigns.members import Question
from engine.campaigns.states import (
    PAGES_OF_CAMPAIGN,
    PAGES_OF_TENANT,
    Campaign,
    CampaignState,
    Page,
    PageState,
    Position,
    Withheld,
)
from engine.postgres import Pool, asking, transaction

LEASE_SECONDS: Final = 5.0
"""How long a campaign waits for another pager when its own has died."""

LOCK: Final = 7345255
"""Of claims: one of a tenant at a time, so that the pages under way can be counted."""

_OPEN: Final = "state IN ('fixed', 'publishing', 'published')"
_UNDER_WAY: Final = "state IN ('publishing', 'published')"

_message: Final = msgspec.json.Decoder(Message).decode
_audience: Final = msgspec.json.Decoder(Audience).decode
_heads: Final = msgspec.json.Decoder(dict[str, str]).decode


class CampaignTable:
    """The tables `campaigns` and `campaign_pages`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def lease(self, owner: str, busy: Collection[tuple[str, str]], most: int) -> list[Campaign]:
        """Campaigns with something to do, at most so many; each is left to `owner` for a while. Tenants take turns.

        Args:
            busy: campaigns that `owner` is working on.
        """
        if most <= 0:
            return []
        tenants, ids = [tenant for tenant, _ in busy], [id for _, id in busy]
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(_LEASE, owner, tenants, ids, most, LEASE_SECONDS)
            pages = await connection.fetch(
                _PAGES, [row["tenant"] for row in rows], [row["id"] for row in rows], PAGES_OF_CAMPAIGN
            )
        found: dict[tuple[str, str], list[Page]] = {}
        for page in pages:
            found.setdefault((page["tenant"], page["campaign"]), []).append(_page_of(page))
        return [_campaign_of(row, tuple(found.get((row["tenant"], row["id"]), ()))) for row in rows]

    async def window(self, campaign: Campaign, after: str, up_to: str | None) -> Window:
        """The audience behind a user, as far as it is looked at for one page; with `up_to` nobody behind that one."""
        question = Question(campaign.audience, campaign.exclude)
        async with asking(self._pool) as connection:
            row = await connection.fetchrow(question.window, campaign.tenant, campaign.id, after, up_to, *question.args)
        assert row is not None
        members = [Member(user, excluded) for user, excluded in zip(row["users"], row["excluded"], strict=True)]
        final = row["scanned"] < question.limit
        return Window(members, up_to if final and up_to is not None else row["reached"], final)

    async def fix(self, campaign: Campaign, piece: Cut) -> bool:
        """Write the boundaries of the next page down; nothing where nobody stands between them."""
        return await self._one(
            _FIX,
            campaign,
            campaign.pages,
            campaign.cut_up_to,
            max(piece.up_to, campaign.cut_up_to),
            piece.final,
            piece.members,
            piece.excluded,
        )

    async def claim(
        self, campaign: Campaign, page: Page, piece: Cut, rest: Cut, event: bytes | None, end: Position | None
    ) -> bool:
        """Take a page for publishing, with its event; False: it is not its turn, or not any more.

        What does not fit becomes a page of its own. Without an event nobody gets anything, and the page is done.

        Args:
            rest: what stands behind `piece` on the page, as far as it was looked at.
            end: where BULK ended before.
        """
        async with transaction(self._pool) as connection:
            await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK}, hashtext($1))", campaign.tenant)
            return bool(
                await connection.fetchval(
                    _CLAIM,
                    campaign.tenant,
                    campaign.id,
                    campaign.revision,
                    page.number,
                    page.up_to,
                    piece.up_to,
                    piece.members,
                    piece.excluded,
                    event,
                    end.epoch if end else None,
                    end.seq if end else None,
                    rest.members,
                    rest.excluded,
                    PAGES_OF_CAMPAIGN,
                    PAGES_OF_TENANT,
                )
            )

    async def event(self, campaign: Campaign, page: Page) -> bytes | None:
        """The event of a page that is being published; None when it is not any more."""
        async with asking(self._pool) as connection:
            event: bytes | None = await connection.fetchval(
                f"SELECT event FROM campaign_pages WHERE {_THIS_PAGE} AND state = 'publishing'",
                campaign.tenant,
                campaign.id,
                page.number,
            )
        return event

    async def published(self, campaign: Campaign, page: Page, at: Position) -> bool:
        """The event of the page stands in BULK."""
        return await self._page(
            "state = 'published', bulk_epoch = $5, bulk_seq = $6, event = NULL, published_at = now()",
            campaign,
            page,
            PageState.PUBLISHING,
            at.epoch,
            at.seq,
        )

    async def note_heads(self, campaign: Campaign, page: Page, heads: dict[str, str]) -> bool:
        """The page is dispatched, and all its records lie before these."""
        said = msgspec.json.encode(heads).decode()
        return await self._page("heads = $5::jsonb", campaign, page, PageState.PUBLISHED, said)

    async def done(self, campaign: Campaign, page: Page, withheld: Withheld | None) -> bool:
        """The page needs nothing more.

        Args:
            withheld: None: nobody has looked; then this does nothing where the campaign has been cancelled meanwhile.
        """
        looked, counted = withheld is not None, withheld or Withheld(0, 0)
        return await self._one(_DONE, campaign, page.number, looked, *counted)

    async def ambiguous(self, campaign: Campaign, page: Page, reason: str) -> bool:
        """Nobody can tell what became of the page."""
        set_ = "state = 'ambiguous', reason = $5, event = NULL, finished_at = now()"
        return await self._page(set_, campaign, page, page.state, reason)

    async def expire(self, campaign: Campaign) -> bool:
        """No page is begun any more: it is later than the campaign allows."""
        return await self._one(_EXPIRE, campaign, campaign.revision)

    async def fail(self, campaign: Campaign, reason: str) -> bool:
        """No page is begun any more: the event of one that waits for its turn can never be published."""
        key = campaign.tenant, campaign.id
        async with transaction(self._pool) as connection:
            # Held first: a claim may be adding a page, which must be seen by what follows.
            if not await connection.fetchval(_HOLD, *key, campaign.revision):
                return False
            if not await connection.fetchval(_FAIL_PAGES, *key, reason):
                return False
            await connection.execute(_FAIL, *key)
        return True

    async def close(self, campaign: Campaign) -> bool:
        """The campaign needs nothing more."""
        return await self._one(_CLOSE, campaign, campaign.revision)

    async def _page(self, change: str, campaign: Campaign, page: Page, state: PageState, *args: Any) -> bool:
        statement = f"UPDATE campaign_pages SET {change} WHERE {_THIS_PAGE} AND state = $4 RETURNING true"
        return await self._one(statement, campaign, page.number, state, *args)

    async def _one(self, statement: str, campaign: Campaign, *args: Any) -> bool:
        async with asking(self._pool) as connection:
            return bool(await connection.fetchval(statement, campaign.tenant, campaign.id, *args))


def _campaign_of(row: Any, pages: tuple[Page, ...]) -> Campaign:
    return Campaign(
        tenant=row["tenant"],
        id=row["id"],
        revision=row["revision"],
        state=CampaignState(row["state"]),
        audience=_audience(row["audience"]),
        exclude=None if row["exclude"] is None else _audience(row["exclude"]),
        message=_message(row["message"]),
        rate=row["rate"],
        publish_at=row["publish_at"],
        not_after=row["not_after"],
        now=row["now"],
        cut_up_to=row["cut_up_to"],
        cut_final=row["cut_final"],
        pages=row["pages"],
        open=pages,
    )


def _page_of(row: Any) -> Page:
    return Page(
        number=row["number"],
        after=row["after_user"],
        up_to=row["up_to"],
        state=PageState(row["state"]),
        count=row["count"],
        excluded=row["excluded"],
        at=None if row["bulk_epoch"] is None else Position(row["bulk_epoch"], row["bulk_seq"]),
        heads=None if row["heads"] is None else _heads(row["heads"]),
    )


_THIS_PAGE: Final = "tenant = $1 AND campaign = $2 AND number = $3"

_LEASE: Final = """
    WITH due AS (
        SELECT c.tenant, c.id, c.leased_until,
               row_number() OVER (PARTITION BY c.tenant ORDER BY c.leased_until, c.id) AS turn
        FROM campaigns c
        WHERE c.finished_at IS NULL AND (c.leased_until < now() OR c.leased_by = $1)
          AND (c.state <> 'running' OR c.start_at <= now())
          AND (c.state <> 'paused' OR c.not_after <= now()
               OR EXISTS (SELECT FROM campaign_pages p WHERE p.tenant = c.tenant AND p.campaign = c.id
                                              AND p.state IN ('publishing', 'published')))
          AND (c.tenant, c.id) NOT IN (SELECT * FROM unnest($2::text[], $3::text[]))
    )
    UPDATE campaigns c SET leased_by = $1, leased_until = now() + make_interval(secs => $5)
    FROM (SELECT * FROM due ORDER BY turn, leased_until LIMIT $4) d
    WHERE c.tenant = d.tenant AND c.id = d.id AND c.finished_at IS NULL AND (c.leased_until < now() OR c.leased_by = $1)
    RETURNING c.tenant, c.id, c.revision, c.state, c.audience, c.exclude, c.message, c.rate, c.publish_at, c.not_after,
              c.cut_up_to, c.cut_final, c.pages, clock_timestamp() AS now
"""

_PAGES: Final = f"""
    SELECT p.* FROM unnest($1::text[], $2::text[]) c (tenant, id),
    LATERAL (
        (SELECT tenant, campaign, number, after_user, up_to, state, count, excluded, bulk_epoch, bulk_seq, heads
         FROM campaign_pages WHERE tenant = c.tenant AND campaign = c.id AND {_OPEN} AND {_UNDER_WAY})
        UNION ALL
        (SELECT tenant, campaign, number, after_user, up_to, state, count, excluded, bulk_epoch, bulk_seq, heads
         FROM campaign_pages WHERE tenant = c.tenant AND campaign = c.id AND {_OPEN} AND state = 'fixed'
         ORDER BY number LIMIT $3)
    ) p ORDER BY p.number
"""

_FIX: Final = """
    WITH cut AS (
        UPDATE campaigns SET cut_up_to = $5, cut_final = $6, pages = pages + ($7 > 0)::integer
        WHERE tenant = $1 AND id = $2 AND state = 'running' AND NOT cut_final AND pages = $3 AND cut_up_to = $4
        RETURNING true
    ), fixed AS (
        INSERT INTO campaign_pages (tenant, campaign, number, after_user, up_to, count, excluded)
        SELECT $1, $2, $3, $4, $5, $7, $8 FROM cut WHERE $7 > 0
    )
    SELECT true FROM cut
"""

# The time that was granted may be made up for a second: looks are a quarter of one apart.
_CLAIM: Final = f"""
    WITH held AS (
        UPDATE campaigns SET pages = pages + ($6::text <> $5::text)::integer,
               publish_at = CASE WHEN $9::bytea IS NULL OR rate IS NULL THEN publish_at
                            ELSE greatest(publish_at, now() - interval '1 second')
                                 + make_interval(secs => ($7::integer - $8::integer)::double precision / rate) END
        WHERE tenant = $1 AND id = $2 AND revision = $3 AND state = 'running' AND publish_at <= clock_timestamp()
          AND (not_after IS NULL OR not_after > clock_timestamp())
          AND EXISTS (SELECT FROM campaign_pages WHERE tenant = $1 AND campaign = $2 AND number = $4 AND up_to = $5
                      AND state = 'fixed')
          AND (SELECT count(*) FROM campaign_pages WHERE tenant = $1 AND campaign = $2 AND {_OPEN} AND {_UNDER_WAY}) < $14
          AND (SELECT count(*) FROM campaign_pages WHERE tenant = $1 AND {_UNDER_WAY}) < $15
        RETURNING pages
    ), claimed AS (
        UPDATE campaign_pages SET up_to = $6, count = $7, excluded = $8, event = $9, bulk_epoch = $10, bulk_seq = $11,
               claimed_at = now(), state = CASE WHEN $9::bytea IS NULL THEN 'done' ELSE 'publishing' END,
               finished_at = CASE WHEN $9::bytea IS NULL THEN now() END
        FROM held WHERE tenant = $1 AND campaign = $2 AND number = $4 RETURNING true
    ), rest AS (
        INSERT INTO campaign_pages (tenant, campaign, number, after_user, up_to, count, excluded)
        SELECT $1, $2, held.pages - 1, $6, $5, $12::integer, $13::integer FROM held WHERE $6::text <> $5::text
    )
    SELECT true FROM claimed
"""

# Whoever cancels changes the campaign before dispatchers hear of it: what is dispatched by then is not withheld.
_DONE: Final = f"""
    UPDATE campaign_pages SET state = 'done', cancelled = least($5, count - excluded),
           expired = least($6, count - excluded - least($5, count - excluded)), finished_at = now()
    WHERE {_THIS_PAGE} AND state = 'published'
      AND ($4 OR EXISTS (SELECT FROM campaigns WHERE tenant = $1 AND id = $2 AND state <> 'cancelled'))
    RETURNING true
"""

_EXPIRE: Final = """
    WITH expired AS (
        UPDATE campaigns SET state = 'expired', revision = revision + 1, changed_at = now()
        WHERE tenant = $1 AND id = $2 AND revision = $3 AND state IN ('running', 'paused') AND not_after <= clock_timestamp()
        RETURNING true
    ), pages AS (
        UPDATE campaign_pages SET state = 'expired', finished_at = now()
        FROM expired WHERE tenant = $1 AND campaign = $2 AND state = 'fixed'
    )
    SELECT true FROM expired
"""

_HOLD: Final = """
    SELECT true FROM campaigns WHERE tenant = $1 AND id = $2 AND revision = $3 AND state IN ('running', 'paused') FOR UPDATE
"""

_FAIL_PAGES: Final = """
    WITH failed AS (
        UPDATE campaign_pages SET state = 'expired', reason = $3, finished_at = now()
        WHERE tenant = $1 AND campaign = $2 AND state = 'fixed' RETURNING true
    )
    SELECT count(*) FROM failed
"""

_FAIL: Final = """
    UPDATE campaigns SET state = 'expired', revision = revision + 1, changed_at = now() WHERE tenant = $1 AND id = $2
"""

# Names that nobody needs any more must not outlast the users who have them.
_CLOSE: Final = f"""
    UPDATE campaigns SET finished_at = now(), state = CASE WHEN state = 'running' THEN 'done' ELSE state END,
           users = NULL, exclude_users = NULL
    WHERE tenant = $1 AND id = $2 AND revision = $3 AND finished_at IS NULL
      AND (state IN ('cancelled', 'expired') OR (state = 'running' AND cut_final))
      AND NOT EXISTS (SELECT FROM campaign_pages WHERE tenant = $1 AND campaign = $2 AND {_OPEN})
    RETURNING true
"""
