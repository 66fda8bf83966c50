"""What holds for users of a tenant who have said nothing."""

from __future__ import annotations

from engine.directory.tenant_defaults import checked_defaults, delete_defaults, find_defaults, put_defaults
from engine.plan.preferences import TenantDefaults
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES, Deletion, VersionQuery, rules_changing
from gateway.api.directory import checked, reading
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, LIMIT_REACHED, VERSION_CONFLICT, Problem

_CHANGES = (VERSION_CONFLICT, LIMIT_REACHED)


@Endpoint("GET", "/v1/tenant/defaults", scope=Scope.CONFIG_READ, places=PLACES)
async def get_defaults(call: Call[Service, None, None]) -> TenantDefaults:
    """The tenant's document of preferences. One that was never written is empty and has no version."""
    async with reading(call.context) as connection:
        return await find_defaults(connection, call.principal.tenant)


@Endpoint("PUT", "/v1/tenant/defaults", scope=Scope.CONFIG_WRITE, places=PLACES, refuses=_CHANGES)
async def replace_defaults(call: Call[Service, VersionQuery, TenantDefaults]) -> TenantDefaults:
    """Put a document in place of the present one. It holds for all notifications planned a second later."""
    if call.body.version:  # passed over, it would look like the protection that the query gives
        said = "`version` counts the changes and is no part of the document: for a condition write it into the query"
        raise Problem(INVALID_BODY, said, field="version")
    with checked():
        document = checked_defaults(call.body)
    async with rules_changing(call.context, call.principal.tenant) as change:
        return await put_defaults(change, document, call.query.version)


@Endpoint("DELETE", "/v1/tenant/defaults", scope=Scope.CONFIG_WRITE, places=PLACES, refuses=_CHANGES)
async def remove_defaults(call: Call[Service, VersionQuery, None]) -> Deletion:
    """Delete the document: rules alone hold for users who have said nothing."""
    async with rules_changing(call.context, call.principal.tenant) as change:
        return Deletion(await delete_defaults(change, call.query.version))
