"""`/v1/users`: the users of a tenant, for its services."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

from engine.directory import users
from engine.directory.users import User, UserFields, UserPatch
from gateway.access.principals import Scope, Service
from gateway.api.directory import PLACES, StoredUserAt, UserAt, checked, directory_of, reading, there
from gateway.api.pages import PageQuery, begin_of, cut
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, NOT_FOUND, USER_DELETED, VERSION_CONFLICT
from gateway.limits import DIRECTORY_SECONDS

USER_BODY_BYTES: Final = 32_768
"""Attributes of 8 KiB, written generously."""


class UserPage(msgspec.Struct):
    """Users in the order of their ids. `next`: the `cursor` of the following page; null behind the last."""

    items: list[User]
    next: str | None


@Endpoint("GET", "/v1/users", scope=Scope.USERS_READ, places=PLACES)
async def user_page(call: Call[Service, PageQuery, None]) -> UserPage:
    """A page of the tenant's users. Who is added or leaves meanwhile moves no other to another page."""
    [after], limit = begin_of(call.query), call.query.limit
    async with reading(call.context) as connection:
        rows = await users.page_of_users(connection, call.principal.tenant, after, limit + 1)
    return UserPage(*cut(rows, limit, lambda user: (user.id,)))


@Endpoint("GET", "/v1/users/{id}", scope=Scope.USERS_READ, places=PLACES, refuses=(NOT_FOUND,))
async def get_user(call: Call[Service, StoredUserAt, None]) -> User:
    """A user."""
    async with reading(call.context) as connection:
        return there(await users.find_user(connection, call.principal.tenant, call.query.id), "such user")


@Endpoint(
    "PUT",
    "/v1/users/{id}",
    scope=Scope.USERS_WRITE,
    places=PLACES,
    body_bytes=USER_BODY_BYTES,
    refuses=(VERSION_CONFLICT, USER_DELETED),
)
async def put_user(call: Call[Service, UserAt, UserFields]) -> User:
    """Make a user, or replace all that is stored of him. The same again changes nothing.

    A user who was deleted begins anew, as soon as nothing is left of what he had (409 `user_deleted` until then).
    """
    tenant, id = call.principal.tenant, call.query.id
    async with directory_of(call.context).changing(tenant, [id], DIRECTORY_SECONDS) as change:
        return await users.put_user(change, id, call.body, call.query.version)


@Endpoint(
    "PATCH",
    "/v1/users/{id}",
    scope=Scope.USERS_WRITE,
    places=PLACES,
    body_bytes=USER_BODY_BYTES,
    refuses=(NOT_FOUND, VERSION_CONFLICT, INVALID_BODY),
)
async def patch_user(call: Call[Service, UserAt, UserPatch]) -> User:
    """Change some of what is stored of a user (RFC 7396): what is left out stays, null takes away, also within `attributes`."""
    tenant, id = call.principal.tenant, call.query.id
    with checked():
        async with directory_of(call.context).changing(tenant, [id], DIRECTORY_SECONDS) as change:
            found = await users.patch_user(change, id, call.body, call.query.version)
    return there(found, "such user: make him with PUT")


class Deleted(msgspec.Struct):
    """`deleted_at`: when the user was deleted, now or before. What he had is erased from then on."""

    id: str
    deleted_at: datetime


@Endpoint("DELETE", "/v1/users/{id}", scope=Scope.USERS_WRITE, status=202, places=PLACES, refuses=(VERSION_CONFLICT,))
async def delete_user(call: Call[Service, StoredUserAt, None]) -> Deleted:
    """Delete a user. His row, tokens and memberships are gone with the answer; log, inbox, deliveries and counts within minutes.

    He needs no row: any user who has a log can be deleted. For 31 days nothing that arrives late brings him back.
    """
    tenant, id = call.principal.tenant, call.query.id
    async with directory_of(call.context).changing(tenant, [id], DIRECTORY_SECONDS) as change:
        return Deleted(id, await users.delete_user(change, id, call.query.version))
