"""`/v1/campaigns`: one message for an audience of any size, for services."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Final

import msgspec

from engine.campaigns.commands import CampaignConflict, Campaigns, NoCampaign, TooManyCampaigns
from engine.campaigns.draft import RATE_MAX, Draft, InvalidCampaign, transaction_id
from engine.campaigns.forecast import forecast
from engine.campaigns.progress import Progress
from engine.profiles.reader import read_profile
from gateway.access.principals import Scope, Service
from gateway.access.shares import Shares
from gateway.api.directory import PLACES, directory_of
from gateway.api.explain import rules_of
from gateway.api.pages import PageQuery, begin_of, cut, moment_of
from gateway.api.transactions import CANCELS_FULL, TOO_MANY_CANCELS, store_cancel
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, INVALID_QUERY, LIMIT_REACHED, NOT_FOUND, UNAVAILABLE, Kind, Problem
from gateway.limits import CAMPAIGN_BODIES, CAMPAIGN_BODIES_PER_TENANT, CAMPAIGN_BODY_BYTES
from projections.deliveries.campaigns import CampaignChannels, ChannelCounts

CAMPAIGN_CONFLICT: Final = Kind(409, "campaign_conflict")

_BODIES: Final = Shares(CAMPAIGN_BODIES, CAMPAIGN_BODIES_PER_TENANT)


class CampaignAt(msgspec.Struct, frozen=True):
    """A campaign in the path."""

    id: str


class Created(msgspec.Struct):
    """`created` is false where this very campaign was there before."""

    id: str
    created: bool


class DryRun(msgspec.Struct):
    """How many users an audience has now, how many of them would get the message, and why the others would not.

    Attributes:
        sample: so many recipients, drawn at random, were looked at; all, where they are few.
        decisions: what the planner would decide of them now: by channel, how often `<when>: <why>`.
    """

    audience: int
    recipients: int
    reasons: dict[str, int]
    sample: int
    decisions: dict[str, dict[str, int]]


class CampaignPage(msgspec.Struct):
    """Campaigns, the newest first. `next`: the `cursor` of the following page; null behind the last."""

    items: list[Progress]
    next: str | None


class NewRate(msgspec.Struct, forbid_unknown_fields=True):
    """Recipients a second; null: as fast as dispatchers can."""

    rate: Annotated[int, msgspec.Meta(ge=1, le=RATE_MAX)] | None


@Endpoint(
    "POST",
    "/v1/campaigns",
    scope=Scope.CAMPAIGNS_WRITE,
    status=202,
    places=_BODIES,
    body_bytes=CAMPAIGN_BODY_BYTES,
    refuses=(CAMPAIGN_CONFLICT, LIMIT_REACHED),
)
async def create_campaign(call: Call[Service, None, Draft]) -> Created:
    """Store a campaign. It begins at once, or at its `start_at`. Sent again, it changes nothing."""
    with _answered():
        created = await _campaigns(call.context).create(call.principal.tenant, call.body)
    return Created(call.body.id, created)


@Endpoint("POST", "/v1/campaigns/dry-run", scope=Scope.CAMPAIGNS_WRITE, places=_BODIES, body_bytes=CAMPAIGN_BODY_BYTES)
async def try_campaign(call: Call[Service, None, Draft]) -> DryRun:
    """Check a campaign, count its audience, and say what would be decided of some recipients; nothing is stored or sent."""
    context, tenant, campaigns = call.context, call.principal.tenant, _campaigns(call.context)
    rules, pool = await rules_of(context, tenant), directory_of(context).pool
    with _answered():
        size = await campaigns.size(tenant, call.body)
        seen = await forecast(
            campaigns,
            tenant,
            call.body,
            rules,
            lambda user: read_profile(pool, tenant, user),
            lambda user: context.controls.controls.drops(tenant, user),
        )
    return DryRun(size.audience, size.recipients, {"excluded": size.excluded}, seen.sample, seen.decisions)


@Endpoint("GET", "/v1/campaigns", scope=Scope.CAMPAIGNS_READ, places=PLACES)
async def campaign_page(call: Call[Service, PageQuery, None]) -> CampaignPage:
    """A page of the tenant's campaigns and their progress."""
    limit = call.query.limit
    found = await _campaigns(call.context).list(call.principal.tenant, limit + 1, _after(call.query))
    return CampaignPage(*cut(found, limit, lambda one: (one.created_at.isoformat(), one.id)))


@Endpoint("GET", "/v1/campaigns/{id}", scope=Scope.CAMPAIGNS_READ, places=_BODIES, refuses=(NOT_FOUND,))
async def get_campaign(call: Call[Service, CampaignAt, None]) -> Draft:
    """A campaign as it was asked for, with its present rate."""
    with _answered():
        return await _campaigns(call.context).read(call.principal.tenant, call.query.id)


@Endpoint("GET", "/v1/campaigns/{id}/progress", scope=Scope.CAMPAIGNS_READ, places=PLACES, refuses=(NOT_FOUND,))
async def campaign_progress(call: Call[Service, CampaignAt, None]) -> Progress:
    """How far a campaign has come: numbers of one moment, which add up."""
    with _answered():
        return await _campaigns(call.context).progress(call.principal.tenant, call.query.id)


class Channels(msgspec.Struct):
    """Notifications of a campaign by channel, of pages that are in BULK, as far as they are folded."""

    channels: dict[str, ChannelCounts]


@Endpoint("GET", "/v1/campaigns/{id}/channels", scope=Scope.CAMPAIGNS_READ, places=_BODIES, refuses=(NOT_FOUND,))
async def campaign_channels(call: Call[Service, CampaignAt, None]) -> Channels:
    """What became of a campaign's notifications on each channel. It looks at all of them, so do not ask it every second."""
    with _answered():
        return Channels(
            await CampaignChannels(directory_of(call.context).pool).of(call.principal.tenant, call.query.id)
        )


_REFUSED: Final = (NOT_FOUND, CAMPAIGN_CONFLICT)


@Endpoint("POST", "/v1/campaigns/{id}/pause", scope=Scope.CAMPAIGNS_WRITE, places=PLACES, refuses=_REFUSED)
async def pause_campaign(call: Call[Service, CampaignAt, None]) -> Progress:
    """Begin no page any more. Pages that were begun are finished: at most four."""
    return await _changed(call, "pause")


@Endpoint("POST", "/v1/campaigns/{id}/resume", scope=Scope.CAMPAIGNS_WRITE, places=PLACES, refuses=_REFUSED)
async def resume_campaign(call: Call[Service, CampaignAt, None]) -> Progress:
    """Go on."""
    return await _changed(call, "resume")


@Endpoint(
    "POST",
    "/v1/campaigns/{id}/cancel",
    scope=Scope.CAMPAIGNS_WRITE,
    places=PLACES,
    refuses=(*_REFUSED, INVALID_QUERY, TOO_MANY_CANCELS, CANCELS_FULL, UNAVAILABLE),
)
async def cancel_campaign(call: Call[Service, CampaignAt, None]) -> Progress:
    """Begin no page ever again. What is not dispatched a second later is shown to nobody, and counted as `cancelled`."""
    progress = await _changed(call, "cancel")
    # Afterwards: a page that is claimed before is in doubt for a while, and whenever it comes, it is withheld.
    await store_cancel(call.context, call.principal.tenant, transaction_id(call.query.id))
    return progress


@Endpoint("PUT", "/v1/campaigns/{id}/rate", scope=Scope.CAMPAIGNS_WRITE, places=PLACES, refuses=_REFUSED)
async def set_campaign_rate(call: Call[Service, CampaignAt, NewRate]) -> Progress:
    """Go on at another rate, from the next page on."""
    campaigns, tenant, id = _campaigns(call.context), call.principal.tenant, call.query.id
    with _answered():
        await campaigns.set_rate(tenant, id, call.body.rate)
        return await campaigns.progress(tenant, id)


async def _changed(call: Call[Service, CampaignAt, None], change: str) -> Progress:
    campaigns, tenant, id = _campaigns(call.context), call.principal.tenant, call.query.id
    with _answered():
        await getattr(campaigns, change)(tenant, id)
        return await campaigns.progress(tenant, id)


def _campaigns(context: Context) -> Campaigns:
    return Campaigns(directory_of(context).pool)


@contextmanager
def _answered() -> Iterator[None]:
    """Errors of campaigns as problems."""
    try:
        yield
    except InvalidCampaign as error:
        raise Problem(INVALID_BODY, str(error), field=error.field) from error
    except CampaignConflict as error:
        raise Problem(CAMPAIGN_CONFLICT, str(error)) from error
    except TooManyCampaigns as error:
        raise Problem(LIMIT_REACHED, str(error)) from error
    except NoCampaign as error:
        raise Problem(NOT_FOUND, str(error)) from error


def _after(query: PageQuery) -> tuple[datetime, str] | None:
    """When the last campaign of the page before was created, and its id."""
    at, id = begin_of(query, 2)
    if query.cursor is None:
        return None
    return moment_of(at), id
