"""How far a campaign has come: numbers of one moment, which add up."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from engine.campaigns.states import CampaignState

STUCK_SECONDS: Final = 60.0
"""A page that stays in one state for longer does not move: publishing takes milliseconds, dispatching a second or two."""

FAILED_PAGE: Final = "state = 'expired' AND reason IS NOT NULL"
"""What the table says of a page that was not published as its campaign has failed."""

RATE_SECONDS: Final = 30.0
"""Over how long the present rate is measured: some pages, even of a slow campaign."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign in numbers of users.

    audience = fixed + publishing + stored + excluded + cancelled + expired + failed + ambiguous.

    Args:
        audience: all users that are on pages so far. audience_final: there will be no more.
        fixed: on pages that wait for their turn.
        publishing: on pages of which it is not known yet whether their event is in BULK.
        stored: on pages whose event is in BULK. dispatched: those of them whose notifications are in their logs, and planned.
        excluded: get nothing: the campaign excludes them, or no event may name them.
        cancelled, expired: on pages that were not published, as the campaign was cancelled, or its time was over; and on pages
            that were, but whose notifications were withheld by then. Until those are counted they are among `stored`.
        failed: on pages that were not published, as the campaign has failed. reason: why.
        ambiguous: on pages of which nobody can tell any more whether they were published.
        recipients_per_second: of the last half minute.
        seconds_left: until the last page is published, at the present rate; null while that cannot be told.
        stuck: what has not moved for a minute; null: everything moves.
    """

    id: str
    state: CampaignState
    audience: int
    audience_final: bool
    fixed: int
    publishing: int
    stored: int
    dispatched: int
    excluded: int
    cancelled: int
    expired: int
    failed: int
    ambiguous: int
    pages: int
    rate: int | None
    recipients_per_second: float
    seconds_left: float | None
    stuck: str | None
    reason: str | None
    start_at: datetime
    created_at: datetime
    finished_at: datetime | None

    @property
    def adds_up(self) -> bool:
        """Whether nobody is counted twice, or not at all."""
        published = self.fixed, self.publishing, self.stored, self.ambiguous
        others = self.excluded, self.cancelled, self.expired, self.failed
        return self.audience == sum(published) + sum(others) and self.dispatched <= self.stored


def progress_of(row: Mapping[str, Any]) -> Progress:
    """The progress that one row of `PROGRESS` says."""
    left = row["fixed"] + row["publishing"]
    speed = _speed(row)
    running = row["state"] == CampaignState.RUNNING
    known = running and row["cut_final"] and (left == 0 or speed > 0)
    return Progress(
        id=row["id"],
        state=_state(row),
        audience=row["audience"],
        audience_final=row["cut_final"],
        fixed=row["fixed"],
        publishing=row["publishing"],
        stored=row["stored"],
        dispatched=row["dispatched"],
        excluded=row["excluded"],
        cancelled=row["cancelled"],
        expired=row["expired"],
        failed=row["failed"],
        ambiguous=row["ambiguous"],
        pages=row["pages"],
        rate=row["rate"],
        recipients_per_second=round(speed, 1),
        seconds_left=round(left / speed if left else 0.0, 1) if known else None,
        stuck=_stuck(row),
        reason=row["reason"],
        start_at=row["start_at"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
    )


def _state(row: Mapping[str, Any]) -> CampaignState:
    state = CampaignState(row["state"])
    return CampaignState.FAILED if state is CampaignState.EXPIRED and row["reason"] is not None else state


def _speed(row: Mapping[str, Any]) -> float:
    """Recipients a second, of the last half minute or of the time since the first page if that is shorter."""
    if not row["recent"]:
        return 0.0
    since: float = (row["now"] - row["first_claimed_at"]).total_seconds()
    return int(row["recent"]) / max(1.0, min(RATE_SECONDS, since))


def _stuck(row: Mapping[str, Any]) -> str | None:
    behind = "dispatched or planned: look at dispatchers and planners"
    if row["state"] == CampaignState.CANCELLED:
        behind = "counted: look at dispatchers, planners and projectors"
    for since, what in (
        (row["publishing_since"], "BULK takes no pages: look at the streams, `seamark topology check`"),
        (row["published_since"], f"pages are in BULK and not {behind}"),
        (row["waiting_since"], "nobody works on it: look at the pagers, `seamark pager`"),
    ):
        if since is not None and (row["now"] - since).total_seconds() > STUCK_SECONDS:
            return what
    return None


PROGRESS: Final = f"""
    SELECT c.id, c.state, c.cut_final, c.rate, c.start_at, c.created_at, c.finished_at, now() AS now, p.*,
           CASE WHEN c.state = 'running' AND c.finished_at IS NULL AND c.start_at < now()
                THEN greatest(c.start_at, c.created_at, c.leased_until) END AS waiting_since
    FROM campaigns c, LATERAL (
        SELECT count(*)::integer AS pages,
               coalesce(sum(count), 0)::bigint AS audience,
               coalesce(sum(count - excluded) FILTER (WHERE state = 'fixed'), 0)::bigint AS fixed,
               coalesce(sum(count - excluded) FILTER (WHERE state = 'publishing'), 0)::bigint AS publishing,
               coalesce(sum(count - excluded - cancelled - expired) FILTER (WHERE state IN ('published', 'done')), 0)::bigint
                   AS stored,
               coalesce(sum(count - excluded - cancelled - expired) FILTER (WHERE state = 'done'), 0)::bigint AS dispatched,
               coalesce(sum(excluded), 0)::bigint AS excluded,
               coalesce(sum(CASE WHEN state = 'cancelled' THEN count - excluded ELSE cancelled END), 0)::bigint AS cancelled,
               coalesce(sum(CASE WHEN state = 'expired' AND reason IS NULL THEN count - excluded ELSE expired END), 0)
                   ::bigint AS expired,
               coalesce(sum(count - excluded) FILTER (WHERE {FAILED_PAGE}), 0)::bigint AS failed,
               max(reason) FILTER (WHERE {FAILED_PAGE}) AS reason,
               coalesce(sum(count - excluded) FILTER (WHERE state = 'ambiguous'), 0)::bigint AS ambiguous,
               coalesce(sum(count - excluded) FILTER (WHERE published_at > now() - interval '{RATE_SECONDS} seconds'), 0)
                   ::bigint AS recent,
               min(claimed_at) AS first_claimed_at,
               min(claimed_at) FILTER (WHERE state = 'publishing') AS publishing_since,
               min(published_at) FILTER (WHERE state = 'published') AS published_since
        FROM campaign_pages WHERE tenant = c.tenant AND campaign = c.id
    ) p
    WHERE c.tenant = $1
"""
"""One statement, so all its numbers are of one moment. Who asks adds which campaigns."""
