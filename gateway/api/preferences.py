"""`/v1/preferences` for a user, `/v1/users/{id}/preferences` for services: what a user wants, and what holds because of it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine.directory.changing import UserDeleted
from engine.directory.rules import TenantRules
from engine.limits import PREFERENCES_BYTES_MAX
from engine.plan.choices import Effective, effective
from engine.plan.preferences import Preferences, QuietHours
from engine.plan.profile import Profile
from engine.profiles.preferences import Stored, find_preferences, patch_preferences
from engine.profiles.reader import read_profile
from gateway.access.principals import Scope, Service, User
from gateway.api.directory import PLACES, StoredUserAt, UserAt, Version, checked, directory_of, reading
from gateway.api.explain import rules_of
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, LIMIT_REACHED, USER_DELETED, VERSION_CONFLICT
from gateway.limits import DIRECTORY_SECONDS

BODY_BYTES: Final = 4 * PREFERENCES_BYTES_MAX
"""A patch may be written generously, and take away as much as it adds."""

_REFUSES: Final = (INVALID_BODY, VERSION_CONFLICT, LIMIT_REACHED, USER_DELETED)


class PreferencesQuery(msgspec.Struct, frozen=True):
    """`version`: only if the document still has it; 0: only if there is none."""

    version: Version | None = None


Patch = dict[str, Any]
"""Of the document of preferences, as RFC 7396 merges it."""


class OfType(msgspec.Struct, frozen=True):
    """What holds for the notifications of a type or pattern, by channel."""

    type: str
    category: str | None
    channels: dict[str, Effective]


class Said(msgspec.Struct, frozen=True):
    """A value, and who says so: `user`, `directory`, `tenant`; `none`: nobody does."""

    value: str | None
    source: str


class Quiet(msgspec.Struct, frozen=True):
    """The quiet hours that hold, and who says so: `user`, `tenant`; `none`: nobody does."""

    value: QuietHours | None
    source: str


class Held(msgspec.Struct):
    """The user's document, and what holds because of it, of the tenant's, and of the rules.

    Attributes:
        version: of the document; 0: there is none.
        types: for each type and pattern that has a rule.
    """

    document: Preferences
    version: int
    locale: Said
    timezone: Said
    quiet_hours: Quiet
    types: list[OfType]


@Endpoint("GET", "/v1/preferences", places=PLACES, refuses=(USER_DELETED,))
async def own_preferences(call: Call[User, None, None]) -> Held:
    """The user's preferences, and the effective value of every type and channel with where it comes from."""
    return await _held(call.context, call.principal.tenant, call.principal.user)


@Endpoint("PATCH", "/v1/preferences", places=PLACES, body_bytes=BODY_BYTES, refuses=_REFUSES)
async def patch_own_preferences(call: Call[User, PreferencesQuery, Patch]) -> Held:
    """Change some of the user's preferences: what is left out stays, null takes away. They hold within a second."""
    return await _patch(call.context, call.principal.tenant, call.principal.user, call.body, call.query.version)


@Endpoint("GET", "/v1/users/{id}/preferences", scope=Scope.USERS_READ, places=PLACES, refuses=(USER_DELETED,))
async def preferences_of_user(call: Call[Service, StoredUserAt, None]) -> Held:
    """A user's preferences, as he sees them himself."""
    return await _held(call.context, call.principal.tenant, call.query.id)


@Endpoint(
    "PATCH",
    "/v1/users/{id}/preferences",
    scope=Scope.USERS_WRITE,
    places=PLACES,
    body_bytes=BODY_BYTES,
    refuses=_REFUSES,
)
async def patch_preferences_of_user(call: Call[Service, UserAt, Patch]) -> Held:
    """Change some of a user's preferences. `version` is that of the document, not of the user."""
    return await _patch(call.context, call.principal.tenant, call.query.id, call.body, call.query.version)


async def _patch(context: Context, tenant: str, user: str, patch: dict[str, Any], expected: int | None) -> Held:
    with checked():
        async with directory_of(context).changing(tenant, [user], DIRECTORY_SECONDS) as change:
            await patch_preferences(change, user, patch, expected)
    return await _held(context, tenant, user)


async def _held(context: Context, tenant: str, user: str) -> Held:
    """From the primary, never the cache: whoever has changed something sees it."""
    rules = await rules_of(context, tenant)
    profile = await read_profile(directory_of(context).pool, tenant, user)
    if profile.deleted:
        raise UserDeleted(user, erasing=False)
    async with reading(context) as connection:
        stored = await find_preferences(connection, tenant, user)
    return held(stored, profile, rules)


def held(stored: Stored, profile: Profile, rules: TenantRules) -> Held:
    """What holds for a user."""
    own, tenant = stored.document, rules.defaults
    if own.quiet_hours is not None:
        quiet = Quiet(own.quiet_hours, "user")
    else:
        quiet = Quiet(tenant.quiet_hours, "none" if tenant.quiet_hours is None else "tenant")
    return Held(
        document=own,
        version=stored.version,
        locale=_first(user=own.locale, directory=profile.locale, tenant=tenant.locale),
        timezone=_first(user=own.timezone, directory=profile.timezone, tenant=tenant.timezone),
        quiet_hours=quiet,
        types=[
            OfType(
                pattern,
                rule.category,
                {
                    channel: effective(channel, pattern, rule.category, rule, own, tenant)
                    for channel in dict.fromkeys(("inapp", *rule.channels))
                },
            )
            for pattern, rule in sorted(rules.types.items())
        ],
    )


def _first(**said: str | None) -> Said:
    return next((Said(value, source) for source, value in said.items() if value is not None), Said(None, "none"))
