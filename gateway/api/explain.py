"""`POST /v1/explain`: what would be decided about an event, and why. Nothing is stored and nothing sent."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec

from engine.directory.rules import TenantRules
from engine.plan.decisions import Facts
from engine.plan.gathering import gathered
from engine.profiles.cache import ProfileCache
from engine.profiles.explanation import Explanation, explain, notification_of
from gateway.access.principals import Scope, Service
from gateway.api.directory import PLACES
from gateway.api.events import EVENT_TOO_LARGE, INVALID_EVENT, NewEvent
from gateway.api.recipients import Inline
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, UNAVAILABLE, Problem, field_of
from gateway.limits import EVENT_BODY_BYTES
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import Accepted, accept, encode
from seamark.protocol.subjects import encode_token

_AN_EVENT: Final = {"$ref": "#/components/schemas/NewEvent"}


class ExplainBody(msgspec.Struct, forbid_unknown_fields=True):
    """`event`: as it would be published. `user`: one of its recipients; left out where it has only one."""

    event: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema=_AN_EVENT)]
    user: str | None = None


@Endpoint(
    "POST",
    "/v1/explain",
    scope=Scope.NOTIFICATIONS_READ,
    places=PLACES,
    body_bytes=EVENT_BODY_BYTES,
    refuses=(INVALID_EVENT, EVENT_TOO_LARGE),
)
async def explain_event(call: Call[Service, None, ExplainBody]) -> Explanation:
    """What the planner would decide now about an event for a user: by which channels, when, why, and from what."""
    context, tenant = call.context, call.principal.tenant
    accepted = _accepted(bytes(call.body.event), Inline(context, call.principal), tenant)
    users = [recipient.user for recipient in accepted.recipients]
    user = call.body.user if call.body.user is not None else users[0]
    if user not in users or (call.body.user is None and len(users) > 1):
        raise Problem(INVALID_BODY, "`user` must be one of those in `event.to`", field="user")
    rules = await rules_of(context, tenant)
    profile = await profiles_of(context).of(tenant, user)
    now, transaction, cancels = datetime.now(UTC), accepted.event.transaction_id, context.cancels
    cancelled = transaction is not None and cancels is not None and cancels.holds(encode_token(tenant), transaction)
    facts, kills = Facts(stored_at=now, cancelled=cancelled), context.controls.controls.drops(tenant, user)
    return explain(gathered(notification_of(accepted, user), facts, rules, profile, kills, now))


def _accepted(body: bytes, inline: Inline, tenant: str) -> Accepted:
    """The event, as it would be stored if this tenant published it. What it brings of its recipients is not looked at.

    Raises:
        Problem: it would be refused.
    """
    try:
        body = inline.split(body)
        event = msgspec.json.decode(body, type=NewEvent)
        unknown = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        given = {name: unknown.pop(name, None) for name in ("id", "to", "type", "tenant", "ordering_key", "data")}
        if event.tenant not in (None, tenant):
            raise InvalidEvent("tenant", "`tenant` is not the tenant of the API key: leave it out")
        encoded = encode(
            to=event.to,
            type=event.type,
            tenant=tenant,
            data=given["data"],
            id=event.id,
            key=event.ordering_key,
            unknown=unknown,
        )
        return accept(
            f"ev.0.{encoded.subject.partition('.')[2]}", encoded.payload
        )  # `bulk.` is another way to the same record
    except InvalidEvent as error:
        raise Problem(EVENT_TOO_LARGE if error.reason == "size" else INVALID_EVENT, error.detail) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(INVALID_EVENT, str(error), field=field_of(error)) from error


async def rules_of(context: Context, tenant: str) -> TenantRules:
    """The rules of a tenant.

    Raises:
        Problem: 503, this gateway has no database. StoreUnavailable: it does not answer.
    """
    if context.rules is None:
        raise Problem(UNAVAILABLE, "this gateway has no database: there are no rules")
    return await context.rules.of(tenant)


def profiles_of(context: Context) -> ProfileCache:
    """The profiles, where there are some.

    Raises:
        Problem: 503, this gateway has no database, or no Redis.
    """
    if context.profiles is None:
        raise Problem(UNAVAILABLE, "this gateway has no database or no Redis: there are no profiles")
    return context.profiles
