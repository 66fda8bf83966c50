"""`POST /v1/webhooks/{id}/replay`: what an endpoint has missed is sent to it.

First its dead letters, by the time at which they were given up: each message is sent again once, however often this is asked,
under the `webhook-id` that it has always had (`engine.letters.replaying`). So what it may have had all the same does no harm.
Then what came while it was disabled, by the time at which it was stored (`projections.deliveries.missed`).
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from engine.directory.webhooks import WebhookEndpoint, find_endpoint
from engine.errors import BrokerError
from engine.jobs.messages import decode_job
from engine.letters.reading import Filter, Found
from engine.letters.replaying import PER_SECOND, Fate, Replays
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES
from gateway.api.dead_letters import AT_ONCE_MAX, Acted, acted, letters_away, letters_page
from gateway.api.directory import directory_of, reading
from gateway.api.pages import PageQuery, begin_of, cursor_after, moment_of
from gateway.api.webhooks import EndpointQuery
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import NOT_FOUND, UNAVAILABLE, Kind, Problem
from projections.deliveries.lost import job_of, record_of
from projections.deliveries.missed import Place, missed_by
from seamark.protocol.moments import check_moment

DISABLED: Final = Kind(409, "endpoint_disabled")
"""It would get nothing: enable it first."""

MISSED: Final = "m."
"""What cursors begin with behind the dead letters: no cursor of those has a full stop."""


class ReplayBody(msgspec.Struct, forbid_unknown_fields=True):
    """Which messages.

    Attributes:
        since, until: when they were given up, or came while the endpoint was disabled; until now, where nothing is said.
        per_second: so many at most.
        cursor: the `next` of the answer before.
    """

    since: datetime
    until: datetime | None = None
    per_second: Annotated[float, Meta(ge=25, le=1000)] = PER_SECOND
    cursor: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a time is no moment that can be stored."""
        check_moment("since", self.since)
        check_moment("until", self.until)


@Endpoint(
    "POST",
    "/v1/webhooks/{id}/replay",
    scope=Scope.WEBHOOKS_WRITE,
    places=PLACES,
    refuses=(NOT_FOUND, DISABLED),
)
async def replay_webhook(call: Call[Service, EndpointQuery, ReplayBody]) -> Acted:
    """Send an endpoint what it has not taken, and what came while it was disabled.

    Call it again with `next` until that is null. Each message is sent once.
    """
    context, tenant, body = call.context, call.principal.tenant, call.body
    replays = context.replays
    if replays is None:
        raise Problem(UNAVAILABLE, "this gateway has no database or no Redis: nobody knows what was sent since")
    async with reading(context) as connection:
        endpoint = await find_endpoint(connection, tenant, call.query.id)
    if endpoint is None:
        raise Problem(NOT_FOUND, "there is no such webhook endpoint: GET /v1/webhooks lists all", field="id")
    if endpoint.state != "active":
        said = f"the endpoint is disabled: PUT /v1/webhooks/{endpoint.id} first, with its `url` and `types` as GET shows them"
        raise Problem(DISABLED, f'{said} and `"state": "active"`: what a PUT leaves out is not kept')
    try:
        if (body.cursor or "").startswith(MISSED):
            fates, next_ = await _missed(context, replays, endpoint, tenant, body, AT_ONCE_MAX)
        else:
            fates, next_ = await _given_up(context, replays, endpoint, tenant, body)
            if next_ is None:
                left = max(1, AT_ONCE_MAX - fates.total())
                more, next_ = await _missed(context, replays, endpoint, tenant, body, left)
                fates += more
    except BrokerError as error:
        raise letters_away(error) from error
    return Acted(dict(fates), next_)


Sent = tuple[Counter[Fate], str | None]
"""What became of how many, and the cursor of what is behind them."""


async def _given_up(
    context: Context, replays: Replays, endpoint: WebhookEndpoint, tenant: str, body: ReplayBody
) -> Sent:
    wanted = Filter(
        tenant=tenant,
        kind="job",
        channel="webhook",
        since=body.since.astimezone(UTC),
        until=None if body.until is None else body.until.astimezone(UTC),
    )
    found, next_ = await letters_page(context, wanted, PageQuery(cursor=body.cursor), AT_ONCE_MAX)
    letters = [one for one in found if target_of(one) == endpoint.id]
    return await acted(letters, body.per_second, lambda one: replays.replay(one, in_doubt=True)), next_


async def _missed(
    context: Context, replays: Replays, endpoint: WebhookEndpoint, tenant: str, body: ReplayBody, limit: int
) -> Sent:
    place, until = Place(body.since.astimezone(UTC)), (body.until or datetime.now(UTC)).astimezone(UTC)
    if (body.cursor or "").startswith(MISSED):
        place, until = _place(body.cursor or "")
    # Older ones were never meant for it.
    place = max(place, Place(endpoint.created_at))
    found, beyond = await missed_by(directory_of(context).pool, tenant, endpoint, place, until, limit)
    assert context.rules is not None, "there is a database"
    rules = await context.rules.of(tenant)
    records = [(one, record) for one in found if (record := record_of(one)) is not None]
    made = [job_of(one, record, rules.rule_of(record.type or "")) for one, record in records]
    jobs = [job for job in made if job is not None]
    return await acted(jobs, body.per_second, replays.missed), None if beyond is None else _cursor(beyond, until)


def _cursor(place: Place, until: datetime) -> str:
    return MISSED + cursor_after((place.at.isoformat(), place.user, place.id, until.isoformat()))


def _place(cursor: str) -> tuple[Place, datetime]:
    """What a cursor says. Raises Problem: 400, no answer has given it."""
    at, user, id, until = begin_of(PageQuery(cursor=cursor.removeprefix(MISSED)), 4)
    return Place(moment_of(at), user, id), moment_of(until)


def target_of(found: Found) -> str:
    """Which endpoint a letter's job is for; "": nobody can tell."""
    try:
        return decode_job(found.stored.payload).target
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
