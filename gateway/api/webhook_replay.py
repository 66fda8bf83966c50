"""`POST /v1/webhooks/{id}/replay`: what an endpoint has missed is sent to it again, by the time at which it was given up.

That is its dead letters, and their replay (`engine.letters.replaying`): each message is sent again once, however often this is
asked, under the `webhook-id` that it has always had. So what it may have had all the same does no harm.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from engine.directory.webhooks import find_endpoint
from engine.errors import BrokerError
from engine.jobs.messages import decode_job
from engine.letters.reading import Filter, Found
from engine.letters.replaying import PER_SECOND
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES
from gateway.api.dead_letters import AT_ONCE_MAX, Acted, acted, letters_away, letters_page
from gateway.api.directory import reading
from gateway.api.pages import PageQuery
from gateway.api.webhooks import EndpointQuery
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import NOT_FOUND, UNAVAILABLE, Kind, Problem

DISABLED: Final = Kind(409, "endpoint_disabled")
"""It would get nothing: enable it first."""


class ReplayBody(msgspec.Struct, forbid_unknown_fields=True):
    """Which messages.

    Attributes:
        since, until: when they were given up; until now, where nothing is said.
        per_second: so many at most.
        cursor: the `next` of the answer before.
    """

    since: datetime
    until: datetime | None = None
    per_second: Annotated[float, Meta(ge=25, le=1000)] = PER_SECOND
    cursor: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a time has no offset."""
        for name in ("since", "until"):
            at = getattr(self, name)
            if at is not None and at.tzinfo is None:
                raise ValueError(f"`{name}` needs an offset, as in 2026-01-31T12:00:00Z")


@Endpoint(
    "POST",
    "/v1/webhooks/{id}/replay",
    scope=Scope.WEBHOOKS_WRITE,
    places=PLACES,
    refuses=(NOT_FOUND, DISABLED),
)
async def replay_webhook(call: Call[Service, EndpointQuery, ReplayBody]) -> Acted:
    """Send an endpoint again what it has not taken. Call it again with `next` until that is null. Each message is sent once."""
    context, tenant, body = call.context, call.principal.tenant, call.body
    replays = context.replays
    if replays is None:
        raise Problem(UNAVAILABLE, "this gateway has no database or no Redis: nobody knows what was sent since")
    async with reading(context) as connection:
        endpoint = await find_endpoint(connection, tenant, call.query.id)
    if endpoint is None:
        raise Problem(NOT_FOUND, "there is no such webhook endpoint: GET /v1/webhooks lists all", field="id")
    if endpoint.state != "active":
        raise Problem(DISABLED, 'the endpoint is disabled: PUT it with `"state": "active"` first')
    wanted = Filter(
        tenant=tenant,
        kind="job",
        channel="webhook",
        since=body.since.astimezone(UTC),
        until=None if body.until is None else body.until.astimezone(UTC),
    )
    found, next_ = await letters_page(context, wanted, PageQuery(cursor=body.cursor), AT_ONCE_MAX)
    missed = [one for one in found if target_of(one) == endpoint.id]
    try:
        fates = await acted(missed, body.per_second, lambda one: replays.replay(one, in_doubt=True))
    except BrokerError as error:
        raise letters_away(error) from error
    return Acted(dict(fates), next_)


def target_of(found: Found) -> str:
    """Which endpoint a letter's job is for; "": nobody can tell."""
    try:
        return decode_job(found.stored.payload).target
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
