"""Webhook endpoints of a tenant and of its users. Secrets are told once, when they are made."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from engine.directory.users import checked_stored_id
from engine.directory.webhooks import (
    EndpointSettings,
    NewEndpoint,
    WebhookEndpoint,
    check_secret,
    create_endpoint,
    delete_endpoint,
    find_endpoint,
    page_of_endpoints,
    replace_endpoint,
    retire_secret,
    rotate_secret,
)
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES, Deletion, rules_changing
from gateway.api.directory import Version, reading
from gateway.api.pages import PageQuery, begin_of, cut
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import LIMIT_REACHED, NOT_FOUND, USER_DELETED, VERSION_CONFLICT, Problem

_CHANGES: Final = (NOT_FOUND, VERSION_CONFLICT, LIMIT_REACHED, USER_DELETED)


class EndpointQuery(msgspec.Struct, frozen=True):
    """`id`: as it was given when the endpoint was made."""

    id: Annotated[str, Meta(pattern=r"^wh_[0-9a-f]{24}$(?!\n)")]


class EndpointVersionQuery(EndpointQuery, frozen=True, kw_only=True):
    """Which endpoint; and `version`, as everywhere."""

    version: Version | None = None


class EndpointsQuery(PageQuery, frozen=True):
    """`user`: only this user's."""

    user: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where nobody can be stored so."""
        if self.user is not None:
            checked_stored_id(self.user, "user")


class SecretBody(msgspec.Struct, forbid_unknown_fields=True):
    """`secret`: `whsec_` and 24 to 64 bytes in base64; left out, one is made."""

    secret: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where it is none."""
        if self.secret is not None:
            check_secret(self.secret)


class WithSecret(WebhookEndpoint, frozen=True, kw_only=True):
    """An endpoint and its newest secret, which is not told again."""

    secret: str


class EndpointsPage(msgspec.Struct):
    """In the order of the ids. `next`: the `cursor` of the following page; null behind the last."""

    items: list[WebhookEndpoint]
    next: str | None


@Endpoint(
    "POST", "/v1/webhooks", status=201, scope=Scope.WEBHOOKS_WRITE, places=PLACES, refuses=(LIMIT_REACHED, USER_DELETED)
)
async def make_webhook(call: Call[Service, None, NewEndpoint]) -> WithSecret:
    """Make an endpoint of the tenant, or of a user. The answer is the only one with the secret."""
    async with rules_changing(call.context, call.principal.tenant, call.body.user) as change:
        made, secret = await create_endpoint(change, call.body, call.context.seal)
    return _with(made, secret)


@Endpoint("GET", "/v1/webhooks", scope=Scope.WEBHOOKS_READ, places=PLACES)
async def list_webhooks(call: Call[Service, EndpointsQuery, None]) -> EndpointsPage:
    """The endpoints of the tenant and its users, without secrets."""
    query = call.query
    [after] = begin_of(query)
    async with reading(call.context) as connection:
        found = await page_of_endpoints(connection, call.principal.tenant, after, query.limit + 1, query.user)
    return EndpointsPage(*cut(found, query.limit, lambda endpoint: (endpoint.id,)))


@Endpoint("GET", "/v1/webhooks/{id}", scope=Scope.WEBHOOKS_READ, places=PLACES, refuses=(NOT_FOUND,))
async def get_webhook(call: Call[Service, EndpointQuery, None]) -> WebhookEndpoint:
    """An endpoint, without its secrets."""
    async with reading(call.context) as connection:
        return _found(await find_endpoint(connection, call.principal.tenant, call.query.id))


@Endpoint("PUT", "/v1/webhooks/{id}", scope=Scope.WEBHOOKS_WRITE, places=PLACES, refuses=_CHANGES)
async def replace_webhook(call: Call[Service, EndpointVersionQuery, EndpointSettings]) -> WebhookEndpoint:
    """Replace the address, the types and the state of an endpoint; its user and secrets stay. `types` left out are all types."""
    async with rules_changing(call.context, call.principal.tenant, await _user_of(call)) as change:
        return _found(await replace_endpoint(change, call.query.id, call.body, call.query.version))


@Endpoint("DELETE", "/v1/webhooks/{id}", scope=Scope.WEBHOOKS_WRITE, places=PLACES, refuses=_CHANGES)
async def remove_webhook(call: Call[Service, EndpointVersionQuery, None]) -> Deletion:
    """Delete an endpoint with its secrets."""
    async with rules_changing(call.context, call.principal.tenant, await _user_of(call)) as change:
        return Deletion(await delete_endpoint(change, call.query.id, call.query.version) is not None)


@Endpoint(
    "POST", "/v1/webhooks/{id}/secret", scope=Scope.WEBHOOKS_WRITE, places=PLACES, refuses=_CHANGES, empty_body=True
)
async def rotate_webhook_secret(call: Call[Service, EndpointVersionQuery, SecretBody]) -> WithSecret:
    """Give an endpoint another secret. The one before stays good, too, until it is deleted or the next one is made."""
    async with rules_changing(call.context, call.principal.tenant) as change:
        made = await rotate_secret(change, call.query.id, call.body.secret, call.query.version, call.context.seal)
    endpoint, secret = made or (None, "")
    return _with(_found(endpoint), secret)


@Endpoint("DELETE", "/v1/webhooks/{id}/secret/previous", scope=Scope.WEBHOOKS_WRITE, places=PLACES, refuses=_CHANGES)
async def retire_webhook_secret(call: Call[Service, EndpointVersionQuery, None]) -> WebhookEndpoint:
    """Let the secret before the present one be good no more, once the receiver knows the new one."""
    async with rules_changing(call.context, call.principal.tenant) as change:
        return _found(await retire_secret(change, call.query.id, call.query.version))


async def _user_of(call: Call[Service, EndpointVersionQuery, Any]) -> str | None:
    """Whose endpoint it is, which never changes."""
    async with reading(call.context) as connection:
        found = await find_endpoint(connection, call.principal.tenant, call.query.id)
    return None if found is None else found.user


def _found(endpoint: WebhookEndpoint | None) -> WebhookEndpoint:
    if endpoint is None:
        raise Problem(NOT_FOUND, "there is no such webhook endpoint: GET /v1/webhooks lists all", field="id")
    return endpoint


def _with(endpoint: WebhookEndpoint, secret: str) -> WithSecret:
    return WithSecret(**msgspec.structs.asdict(endpoint), secret=secret)
