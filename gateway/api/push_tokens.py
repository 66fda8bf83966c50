"""`/v1/devices`, and `/v1/users/{id}/devices` for services: where the apps and browsers of a user get pushes."""

from __future__ import annotations

from typing import Final

import msgspec

from engine.directory import push_tokens
from engine.directory.push_tokens import HeldElsewhere, NewToken, StoredToken, TokenId
from engine.errors import StoreUnavailable
from gateway.access.principals import Scope, Service, User
from gateway.api.directory import PLACES, StoredUserAt, UserAt, directory_of, reading
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import USER_DELETED
from gateway.limits import DIRECTORY_SECONDS

TRIES: Final = 5
"""A token that others register meanwhile belongs to somebody else each time one looks."""


class Tokens(msgspec.Struct):
    """All push tokens of a user, without the tokens themselves."""

    items: list[StoredToken]


class TokenAt(msgspec.Struct, frozen=True):
    """A token of the user who asks. `token_id`: chosen by the app, the same for each registration of one installation."""

    token_id: TokenId


class StoredTokenAt(StoredUserAt, frozen=True, kw_only=True):
    """A token of a user that is removed."""

    token_id: TokenId


class TokenOfUserAt(UserAt, frozen=True, kw_only=True):
    """A token of a user that is registered."""

    token_id: TokenId


class Removed(msgspec.Struct):
    """`removed`: whether there was such a token."""

    removed: bool


@Endpoint("GET", "/v1/devices", places=PLACES)
async def own_tokens(call: Call[User, None, None]) -> Tokens:
    """The push tokens of the user."""
    return await _tokens(call.context, call.principal.tenant, call.principal.user)


@Endpoint("PUT", "/v1/devices/{token_id}", places=PLACES, refuses=(USER_DELETED,))
async def register_own_token(call: Call[User, TokenAt, NewToken]) -> StoredToken:
    """Register a push token for the user. Whoever had the same token before has it no more."""
    user = call.principal
    return await _register(call.context, user.tenant, user.user, call.query.token_id, call.body)


@Endpoint("DELETE", "/v1/devices/{token_id}", places=PLACES)
async def remove_own_token(call: Call[User, TokenAt, None]) -> Removed:
    """Remove a push token of the user, as an app does when its user signs out."""
    user = call.principal
    return await _remove(call.context, user.tenant, user.user, call.query.token_id)


@Endpoint("GET", "/v1/users/{id}/devices", scope=Scope.DEVICES_READ, places=PLACES)
async def tokens_of_user(call: Call[Service, StoredUserAt, None]) -> Tokens:
    """The push tokens of a user."""
    return await _tokens(call.context, call.principal.tenant, call.query.id)


@Endpoint("PUT", "/v1/users/{id}/devices/{token_id}", scope=Scope.DEVICES_WRITE, places=PLACES, refuses=(USER_DELETED,))
async def register_token(call: Call[Service, TokenOfUserAt, NewToken]) -> StoredToken:
    """Register a push token for a user. Whoever had the same token before has it no more."""
    return await _register(call.context, call.principal.tenant, call.query.id, call.query.token_id, call.body)


@Endpoint("DELETE", "/v1/users/{id}/devices/{token_id}", scope=Scope.DEVICES_WRITE, places=PLACES)
async def remove_token(call: Call[Service, StoredTokenAt, None]) -> Removed:
    """Remove a push token of a user."""
    return await _remove(call.context, call.principal.tenant, call.query.id, call.query.token_id)


async def _tokens(context: Context, tenant: str, user: str) -> Tokens:
    async with reading(context) as connection:
        return Tokens(await push_tokens.tokens_of(connection, tenant, user))


async def _register(context: Context, tenant: str, user: str, id: str, new: NewToken) -> StoredToken:
    """Hold whoever has the token beside the user, then move it. Between the two looks it may have moved again."""
    async with reading(context) as connection:
        owner = await push_tokens.owner_of(connection, tenant, new.hash)
    for _ in range(TRIES):
        users = {user} if owner is None else {user, owner}
        try:
            async with directory_of(context).changing(tenant, users, DIRECTORY_SECONDS) as change:
                return await push_tokens.register_token(change, user, id, new)
        except HeldElsewhere as error:
            owner = error.user
    raise StoreUnavailable("the token moved from user to user meanwhile")


async def _remove(context: Context, tenant: str, user: str, id: str) -> Removed:
    async with directory_of(context).changing(tenant, [user], DIRECTORY_SECONDS) as change:
        return Removed(await push_tokens.remove_token(change, user, id))
